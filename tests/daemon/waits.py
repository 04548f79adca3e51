"""How long a worker was kept waiting, and how much of that its processes waited for a CPU to run on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONG_SECONDS = 0.5


class Waits:
    """Attributes:
    long: of every wait longer than LONG_SECONDS, its seconds and those spent waiting for a CPU.
    longest: seconds.
    """

    def __init__(self) -> None:
        self.long: list[tuple[float, float]] = []
        self.longest = 0.0

    @contextmanager
    def measured(self, *pids: int) -> Iterator[None]:
        """What happens here depends on these processes; 0 for none."""
        queued, started = cpu_wait(*pids), time.monotonic()
        yield
        waited = time.monotonic() - started
        self.longest = max(self.longest, waited)
        if waited > LONG_SECONDS:
            self.long.append((waited, max(0.0, cpu_wait(*pids) - queued)))


def cpu_wait(*pids: int) -> float:
    """Seconds that the threads of these processes have been ready to run and did not, all together."""
    nanoseconds = 0
    for pid in filter(None, pids):
        for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                nanoseconds += int(schedstat.read_text().split()[1])
            except OSError:  # it has ended
                continue
    return nanoseconds / 1e9
