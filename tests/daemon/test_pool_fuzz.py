"""Workers at random over one pool: unreadable records, hints, prefills, limits that move, workers that come and go."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.fuzzing import Fuzzer
from tests.daemon.pools import Pool
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, MIXED
from vllm_moe_offload.pool import loader
from vllm_moe_offload.store import RecordLayout

WORKERS, LIMIT = 3, 12


@pytest.mark.parametrize(("layout", "unreadable", "seed"), [(ALIGNED, 0.0, 0), (MIXED, 0.02, 1), (ALIGNED, 0.2, 2)])
def test_whatever_workers_do_records_are_right_and_everybody_is_answered(
    tmp_path: Path, layout: RecordLayout, unreadable: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, read = np.random.default_rng(seed), os.preadv

    def preadv(fd: int, buffers: list, offset: int) -> int:
        if broken.random() < unreadable:
            raise OSError(5, "EIO")
        return read(fd, buffers, offset)

    with Pool(tmp_path, limit=LIMIT, layout=layout) as it, monkeypatch.context() as patch:
        patch.setattr(loader.os, "preadv", preadv)
        workers = [Fuzzer(it, entry, seed) for entry in range(WORKERS)]
        draw = np.random.default_rng(seed)
        deadline = time.monotonic() + 120
        while any(worker.thread.is_alive() for worker in workers):
            assert time.monotonic() < deadline, "somebody is stuck"
            it.pool.run_maintenance()
            it.pool.check_integrity()
            it.pool.limit = int(draw.choice([1, 6, 8, LIMIT, 20, 32]))
            for worker in workers:
                worker.thread.join(0.001)
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
        wait_until(lambda: not it.pool.in_flight.loads, "every load had ended")
        it.pool.limit = LIMIT
        it.run_maintenance()
        it.pool.check_integrity()
        assert not it.pool.cache.pins.any() and it.pool.held <= LIMIT
