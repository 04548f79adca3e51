"""Independent replays side by side, one per core. Results do not depend on how many there are."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

# A forked worker finds its job, and the large arrays it closes over, here instead of receiving a pickled copy.
_jobs: list[Callable[[], object]] = []


def run_all(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Results of all jobs, in order. Where processes cannot be forked, one after the other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), cores)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [job() for job in jobs]
    _jobs[:] = jobs
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            return pool.map(_run, range(len(jobs)), chunksize=1)  # type: ignore[arg-type]
    finally:
        _jobs.clear()


def _run(index: int) -> object:
    return _jobs[index]()
