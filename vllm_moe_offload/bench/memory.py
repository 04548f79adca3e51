"""Memory of an engine's process tree: how much it peaks at.

Must not add memory or noticeable load to what it measures: it reads /proc of a few processes, from outside them.
"""

import re
import threading
from pathlib import Path
from typing import Self

import psutil

from ..threads import ReportedThread

SAMPLE_SECONDS = 0.02
TREE_SECONDS = 0.5


class PeakSampler:
    """Samples anonymous + shared memory of a process and its descendants until stopped.

    `peak_bytes` is the largest sum seen. A page shared by two processes counts in both, so it is an upper bound.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = ReportedThread(target=self._run, daemon=True, name="moe-offload-peak")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        tree, samples = [self.pid], 0
        while not self._stop.wait(SAMPLE_SECONDS):
            if samples % int(TREE_SECONDS / SAMPLE_SECONDS) == 0:
                tree = [self.pid, *(child.pid for child in descendants(self.pid))]
            samples += 1
            self.peak_bytes = max(self.peak_bytes, sum(anonymous_and_shared(pid) for pid in tree))


def descendants(pid: int) -> list[psutil.Process]:
    """Living descendants of a process; none if it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def anonymous_and_shared(pid: int) -> int:
    """RssAnon + RssShmem of one process in bytes; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
