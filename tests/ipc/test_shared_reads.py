"""Several processes read shared slots while another evicts as violently as it can: no wrong byte is computed on."""

import random

import numpy as np
import pytest
from daemon_stress import LAYOUT, Evictor, Violence, acquire, fill, is_right, run

from vllm_moe_offload.ipc.arena import Arena
from vllm_moe_offload.ipc.epochs import Reader, Reclaimer
from vllm_moe_offload.ipc.table import ResidencyTable


class HastyReclaimer(Reclaimer):
    """Believes that nobody reads: what the stress test is there to catch."""

    def _oldest_reader(self) -> int:
        return self._epoch


@pytest.mark.parametrize(
    ("violence", "acquisitions"),
    [
        pytest.param(Violence(readers=2), 150_000, id="two readers"),
        pytest.param(Violence(readers=4, experts=8, limit=4, at_once=2, seed=1), 50_000, id="four readers, few slots"),
    ],
)
def test_nobody_computes_on_wrong_bytes(violence: Violence, acquisitions: int) -> None:
    outcome = run(violence, acquisitions)
    assert (outcome.wrong, outcome.lost_slots) == (0, 0)
    assert outcome.acquisitions >= acquisitions
    assert min(outcome.evictions, outcome.taken, outcome.held_up) > 100, f"not violent: {outcome}"


def test_a_reclaimer_that_does_not_wait_is_caught() -> None:
    assert run(Violence(readers=2), 200_000, HastyReclaimer).wrong > 10


@pytest.mark.parametrize(("reclaimer", "right"), [(Reclaimer, True), (HastyReclaimer, False)])
def test_an_eviction_in_the_middle_of_reading(reclaimer: type[Reclaimer], right: bool) -> None:
    arena, table = Arena.create("test", LAYOUT, 2), ResidencyTable.create("test", 2)
    table.admit(0)
    daemon, reader = reclaimer(table), Reader(table, 0)
    fill(arena, 0, expert=0, generation=1)
    daemon.publish(np.array([0]), np.array([0]))
    reader.enter()
    slot = int(table.slot_of[0])
    assert is_right(arena, slot, expert=0)
    daemon.retire(np.array([0]), np.array([0]))
    for free in daemon.reclaim().tolist():
        fill(arena, free, expert=1, generation=2)
    assert is_right(arena, slot, expert=0) == right
    reader.leave()


@pytest.mark.parametrize("component", [0, 1])
def test_a_single_wrong_byte_is_noticed(component: int) -> None:
    evictor = Evictor(Violence(experts=2, limit=1), Reclaimer)
    evictor.load()
    reader, draw = Reader(evictor.table, 0), random.Random(0)
    assert acquire(reader, evictor.arena, evictor.table, draw, 4) == (1, 1, 0, 0)
    evictor.arena.slot(0)[component][3] ^= 1
    assert acquire(reader, evictor.arena, evictor.table, draw, 4) == (1, 1, 0, 1)
