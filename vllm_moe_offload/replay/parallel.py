"""Independent replays side by side, one per core. Results do not depend on how many there are."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# A forked worker finds its job, and the large arrays it closes over, here instead of receiving a pickled copy.
_jobs: list[Callable[[], object]] = []


Progress = Callable[[int, int], None]
"""Told how many of so many jobs are done."""


def unseen(done: int, total: int) -> None:
    """Progress that is not shown."""


def run_all(jobs: Sequence[Callable[[], T]], progress: Progress = unseen) -> list[T]:
    """Results of all jobs, in order. Where processes cannot be forked, one after the other."""
    results: list[T] = []
    progress(0, len(jobs))
    for result in _results(jobs):
        results.append(result)
        progress(len(results), len(jobs))
    return results


def _results(jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), cores)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (job() for job in jobs)
        return
    _jobs[:] = jobs
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap(_run, range(len(jobs)))
    finally:
        _jobs.clear()


def _run(index: int) -> object:
    return _jobs[index]()
