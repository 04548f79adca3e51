"""How far the kernel reads ahead in files of one device: what a page fault in a mapped file brings in. Linux, root."""

import os
from pathlib import Path


class ReadAhead:
    """A read-ahead of `kib` KiB on the device that `path` is on, from `set` to `restore`.

    It holds for files that are opened meanwhile, for as long as they are open. Raises OSError where the kernel has no
    such setting for the device, or does not let us change it.
    """

    def __init__(self, path: Path, kib: int) -> None:
        device = path.stat().st_dev
        self.kib = kib
        self._setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        self._before: str | None = None

    def set(self) -> None:
        """Set it, remembering what it was."""
        before = self._setting.read_text()
        self._setting.write_text(str(self.kib))
        self._before = before

    def restore(self) -> None:
        """Set it back to what it was before `set`."""
        if self._before is not None:
            self._setting.write_text(self._before)
            self._before = None
