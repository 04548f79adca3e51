"""A daemon in a process of its own, to be killed: it keeps histories, and serves experts of no real model."""

import os
import threading
from pathlib import Path

from served_daemon import ServedDaemon

from vllm_moe_offload.daemon import histories
from vllm_moe_offload.trace import persistence


def serve(socket: str, folder: str, seconds_between_saves: float) -> None:
    """Until killed, or until whoever started it is gone."""
    histories.SECONDS_BETWEEN_ROUNDS = seconds_between_saves
    persistence.SECONDS_BETWEEN_SAVES = seconds_between_saves
    with ServedDaemon(Path(socket), history=Path(folder)):
        print("serving", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            threading.Event().wait(0.2)
