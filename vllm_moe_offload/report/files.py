"""Reports as files: one per worker and model, replaced whole, gone with its worker.

A file counts as long as its writer holds a lock on it, which the kernel drops with the process whatever ended it, and
which is seen across containers that share the folder, as process ids are not.
"""

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from ..store.files import try_lock
from .report import WorkerReport

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "VLLM_MOE_OFFLOAD_REPORTS"
_SUFFIX = ".report"
_unreadable: set[str] = set()


def reports_folder() -> Path:
    """Where the engines of this user report: ``VLLM_MOE_OFFLOAD_REPORTS``, else a folder of the user's in memory."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK | os.X_OK) else Path("/tmp")
    return parent / f"vllm-moe-offload-reports-{os.geteuid()}"


def make_reports_folder(folder: Path) -> None:
    """Make ``folder`` for this user alone, where there is none.

    Raises:
        OSError: it cannot be made, or is not this user's alone.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of this user alone")


class ReportFile:
    """The file of one writer.

    Args:
        name: in ``folder``, no other writer's.

    Raises:
        OSError: there can be no files in the folder.
    """

    def __init__(self, folder: Path, name: str):
        make_reports_folder(folder)
        self._path = folder / f"{name}{_SUFFIX}"
        self._temporary = folder / f".{name}{_SUFFIX}"
        self._locked = -1
        """Descriptor of the file that is at the path."""

    def write(self, report: WorkerReport) -> None:
        """Replace what was written before.

        Raises:
            OSError: it cannot be written; what was written before stays.
        """
        content = msgspec.msgpack.encode(report)
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try_lock(descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            self._temporary.replace(self._path)
        except BaseException:
            os.close(descriptor)
            raise
        self._unlock()
        self._locked = descriptor

    def close(self) -> None:
        """Remove it. Idempotent."""
        self._path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._locked >= 0:
            os.close(self._locked)
            self._locked = -1


def read_reports(folder: Path | None = None) -> list[WorkerReport]:
    """Of all running workers, by engine, replica and rank. Removes what workers have left that were killed.

    A file that is no report, as of another version, is passed over, which is logged once.

    Args:
        folder: None for ``reports_folder()``.
    """
    reports = []
    for path in sorted((reports_folder() if folder is None else folder).glob(f"[!.]*{_SUFFIX}")):
        content = _content(path)
        if content is None:
            continue
        try:
            reports.append(msgspec.msgpack.decode(content, type=WorkerReport))
        except msgspec.MsgspecError as error:
            if str(path) not in _unreadable:
                _unreadable.add(str(path))
                logger.warning("%s is not a report of this version of vllm-moe-offload: %s", path, error)
    return sorted(reports, key=lambda report: (report.engine, report.replica, report.rank, report.role))


def _content(path: Path) -> bytes | None:
    """What a running worker has written; None where it has ended, or may not be read."""
    try:
        with path.open("rb") as file:
            if not try_lock(file.fileno(), shared=True):
                return file.read()
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
                return None
    except OSError:
        return None
    with suppress(OSError):  # it has been replaced meanwhile
        return path.read_bytes()
    return None
