"""What whoever uses a server sees, through its port. One server serves all of these tests."""

import subprocess
import sys
from pathlib import Path

from tests.e2e.served import Served

CLIENT = Path(__file__).parents[2] / "examples" / "openai_client.py"


def test_an_openai_client_is_answered(served: Served) -> None:
    command = [sys.executable, str(CLIENT), "--url", f"{served.url}/v1", "--prompt", "def add(a, b):"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first.strip() and first == second
    assert "moe-offload: offloading 8 of 8 MoE layers" in served.log.read_text()
