"""A root, an identity, and processes that build stores."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_moe_offload.store import StoreIdentity, StoreRoot


@pytest.fixture
def root(tmp_path: Path) -> StoreRoot:
    return StoreRoot(tmp_path / "stores")


@pytest.fixture
def identity(tmp_path: Path) -> StoreIdentity:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    return StoreIdentity({"vllm": "0.32.0", "parallel": {"tp_rank": 0, "tp_size": 1}}, model=str(checkpoint))


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start tests/store/builder.py with the given arguments; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).parent / "builder.py"), *map(str, arguments)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
