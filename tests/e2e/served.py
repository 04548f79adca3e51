"""A real ``vllm serve`` of the bundled model with a quarter of its experts in memory."""

import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.e2e.live_engine import PRELOADED

OFFLOAD = ("--moe-offload-cache", "25%", "--moe-offload-daemon", "off")
SMALL = ("--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(16 << 20))
_POLL_SECONDS = 0.3


class Served(NamedTuple):
    """The server."""

    url: str
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()


def run_vllm(words: list[str], log: Path) -> None:
    """Be the command ``vllm``, in a process that has imported it already, with what it says in a file."""
    from vllm.entrypoints.cli.main import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["vllm", *words]
    main()


@contextmanager
def serve(model: Path, log: Path, *words: str) -> Iterator[Served]:
    """Serve ``model`` until the block ends. Yields when the server answers.

    Raises:
        AssertionError: it has ended; with the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), *SMALL, *words]
    process = PRELOADED.Process(target=run_vllm, args=(command, log))
    process.start()
    served = Served(f"http://127.0.0.1:{port}", log)
    try:
        while not _answers(served):
            process.join(_POLL_SECONDS)
            assert process.is_alive(), log.read_text()[-6000:]
        yield served
    finally:
        process.terminate()
        process.join()


def _answers(served: Served) -> bool:
    try:
        served.get("/health")
    except OSError:
        return False
    return True
