"""Threads that report their end, and the processors they run on. Every thread of the package is made here."""

import ctypes
import logging
import os
import threading
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger(__name__)

_failed: list[str] = []
_refused: set[str] = set()


class ReportedThread(threading.Thread):
    """A thread whose end by an exception is logged and counted; ``threading.excepthook`` is called all the same."""

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            if not isinstance(error, SystemExit):
                reason = f"{self.name}: {type(error).__name__}: {error}"
                _failed.append(reason)
                logger.error("a thread has ended by an error: %s", reason)
            raise


def failed_threads() -> list[str]:
    """Threads of this process that have ended by an exception: name and exception of each."""
    return list(_failed)


def bind_to(cpus: Collection[int] | None, task: int = 0) -> None:
    """Have a thread or process run on these processors; where the system refuses, it stays put, which is logged.

    Args:
        cpus: None or empty for no change.
        task: its number; 0 for the calling thread.
    """
    if not cpus:
        return
    try:
        os.sched_setaffinity(task, cpus)
    except ProcessLookupError:
        return  # it has ended
    except OSError as error:
        _log_once(f"threads are not bound to processors {_ranges(cpus)} ({error.strerror}): they run where they may")


def use_lowest_priority() -> None:
    """Have the calling thread give way to all others; where the system refuses, its priority stays, which is logged."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    except OSError as error:
        _log_once(f"background threads keep their priority: lowering it was refused ({error.strerror})")


def processors_for_reading() -> set[int]:
    """Processors for reading: those to which no thread of this process is bound alone, or all where every one is taken.

    vLLM binds each compute thread to one; a thread started by such a one would otherwise inherit that processor.
    """
    of_threads = _affinities()
    try:
        allowed = os.sched_getaffinity(os.getppid())
    except OSError:
        allowed = set()
    allowed |= set().union(*of_threads)
    bound = {cpu for cpus in of_threads if len(cpus) == 1 for cpu in cpus}
    return allowed - bound or allowed


def _affinities() -> list[set[int]]:
    """Of each thread of this process; threads may end meanwhile."""
    found = [os.sched_getaffinity(0)]
    for task in Path("/proc/self/task").iterdir():
        try:
            found.append(os.sched_getaffinity(int(task.name)))
        except ProcessLookupError:
            continue
    return found


def _log_once(sentence: str) -> None:
    if sentence not in _refused:
        _refused.add(sentence)
        logger.warning(sentence)


def _ranges(cpus: Collection[int]) -> str:
    ordered = sorted(cpus)
    return ", ".join(map(str, ordered)) if len(ordered) <= 8 else f"{ordered[0]} to {ordered[-1]}"


def keep_blas_on_one_thread() -> bool:
    """Keep numpy's matrix products on the calling thread. Whether its BLAS was found; PyTorch's is not touched.

    They are small and run between the layers of a step. Split over threads they would wait for processors that the
    model's own compute threads occupy: microseconds become milliseconds.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if "numpy" in line and "openblas" in line}
    found = False
    for path in sorted(libraries):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(1)
                found = True
                break
    return found
