"""Memory of an engine's processes: which files they have mapped, and a cgroup to keep them in. Linux only."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


def drop_caches() -> None:
    """Forget cached file pages, so that the next read comes from the disk. Raises PermissionError unless root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def mapped_file_bytes(pid: int, besides: Sequence[Path]) -> int:
    """Bytes of mapped files that are in memory for a process, besides those in the folders `besides`; 0 if it is gone.

    What several processes share counts by parts (PSS); pages written to and shared memory do not count.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    others = ("/dev/", "/memfd:", "/SYSV", *(f"{folder.resolve()}/" for folder in besides))
    kib, pss, counts = 0, 0, False
    for line in lines:
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            path = fields[5] if len(fields) == 6 else ""
            counts = path.startswith("/") and not path.startswith(others)
        elif counts and fields[0] == "Pss:":
            pss = int(fields[1])
        elif counts and fields[0] == "Anonymous:":
            kib += max(0, pss - int(fields[1]))
    return 1024 * kib


class MemoryLimit:
    """A memory cgroup (v1 or v2) of its own for one engine; the engine's first process enters it by itself.

    Raises:
        OSError: cgroups of memory are not available or not writable here.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._is_v1 = V1.is_dir()
        self.path = (V1 if self._is_v1 else V2) / f"moe-offload-bench-{os.getpid()}-{re.sub('[^a-z0-9]+', '-', name)}"
        if not self._is_v1 and "memory" not in (V2 / "cgroup.controllers").read_text().split():
            raise OSError(f"--memory-limit: the memory controller is not available in {V2}")
        self.path.mkdir()
        try:
            limit = self.path / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")
            limit.write_text(str(limit_bytes))
            self._forbid_swap(limit_bytes)
        except OSError:
            self.path.rmdir()
            raise

    def _forbid_swap(self, limit_bytes: int) -> None:
        name, value = ("memory.memsw.limit_in_bytes", limit_bytes) if self._is_v1 else ("memory.swap.max", 0)
        if (self.path / name).exists():
            (self.path / name).write_text(str(value))

    def enter_file(self) -> Path:
        """Where a process writes its number to enter."""
        return self.path / "cgroup.procs"

    def kills(self) -> int:
        """How many processes the kernel has killed in here for want of memory."""
        events = self.path / ("memory.oom_control" if self._is_v1 else "memory.events")
        found = re.search(r"^oom_kill (\d+)", events.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def remove(self) -> None:
        """Remove the group once its processes have ended."""
        self.path.rmdir()
