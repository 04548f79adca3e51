"""The command, on a machine that takes its time to write histories and to end: each waits for a file to appear.

    python -m tests.daemon.slow_daemon FOLDER daemon …

It writes ``FOLDER/saving`` and ``FOLDER/ending`` when it gets there, and goes on when ``FOLDER/saved`` and
``FOLDER/ended`` are there.
"""

import sys
import time
from pathlib import Path
from typing import Any

from vllm_moe_offload.cli import app
from vllm_moe_offload.daemon.models import DaemonModels
from vllm_moe_offload.trace.archive import HistoryArchive

folder = Path(sys.argv[1])


def slowly(owner: type, verb: str, begun: str, over: str) -> None:
    act = getattr(owner, verb)

    def wait_and_act(self: object, *arguments: object, **named: object) -> Any:
        (folder / begun).touch()
        while not (folder / over).exists():
            time.sleep(0.01)
        return act(self, *arguments, **named)

    setattr(owner, verb, wait_and_act)


slowly(HistoryArchive, "write", "saving", "saved")
slowly(DaemonModels, "close", "ending", "ended")
app(sys.argv[2:], prog_name="vllm-moe-offload")
