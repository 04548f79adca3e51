"""A folder for the life of one process. What a killed process has left is removed by the next that makes one."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from ..store.files import try_lock, wait_for_lock

_LOCK = "in-use.lock"


class TemporaryFolder:
    """A folder below the system's folder for temporary files that only this user can enter.

    Args:
        prefix: of its name. Folders of this user that begin so, and whose process is gone, are removed.
    """

    def __init__(self, prefix: str):
        _remove_leftovers(prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            lock = self.path / _LOCK
            self._lock = lock.open("xb")
            wait_for_lock(self._lock.fileno())
            if lock.exists():  # another process that makes one may have taken it for a leftover
                return
            self._lock.close()

    def cleanup(self) -> None:
        """Remove it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_leftovers(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with (folder / _LOCK).open("rb") as lock:
                if try_lock(lock.fileno()):
                    shutil.rmtree(folder, ignore_errors=True)
