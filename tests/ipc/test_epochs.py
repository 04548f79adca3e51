"""No slot comes back while someone may read it: in every order a weakly ordered machine allows, and at random.

The real Reclaimer runs; the reader's loads and stores are carried out one by one, at any time the machine could.
"""

import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.ipc.epochs import Reader, Reclaimer
from vllm_moe_offload.ipc.table import ABSENT, EPOCH, ResidencyTable

WORKER = 1
VICTIM, NEW, SLOT = 0, 1, 0
R1, R2, R3, R4, R5 = range(5)
GAPS = 9
"""Between what the reclaimer does: W1 | B1 | W2 | W3 | B2 | W4 | B3 | W5 (names of epochs.py)."""
BEFORE_B1, BEFORE_B2, BEFORE_B3 = 1, 4, 6


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers)


class WeakReader:
    """One pass of a reader over one expert, its five accesses each at a gap of its own.

    A *leased* one knows where the expert would be, so that it may load the bytes before it knows that they are there.
    """

    def __init__(self, table: ResidencyTable, memory: list[int], expert: int, gaps: tuple[int, ...]):
        self.table, self.memory, self.expert = table, memory, expert
        self.at = [[access for access in range(5) if gaps[access] == gap] for gap in range(GAPS)]
        self.leased = gaps[R3] > gaps[R4]
        self.epoch = 0
        self.slot = ABSENT
        self.loaded: int | None = None

    @property
    def read(self) -> int | None:
        """What it computed with, if it found the expert."""
        return None if self.slot == ABSENT else self.loaded

    def pass_gap(self, gap: int) -> None:
        for access in self.at[gap]:
            self._carry_out(access)

    def _carry_out(self, access: int) -> None:
        if access == R1:
            self.epoch = self.table.epoch
        elif access == R2:
            self.table.active[WORKER] = self.epoch
        elif access == R3:
            self.slot = int(self.table.slot_of[self.expert])
        elif access == R4 and (self.leased or self.slot != ABSENT):
            self.loaded = self.memory[SLOT if self.leased else self.slot]
        elif access == R5:
            self.table.active[WORKER] = 0


def orders(barriers: set[int], leased: bool) -> Iterator[tuple[int, ...]]:
    """All times of the five accesses: a store to ``active`` follows the value it stores and the store before it, a load
    follows its address; nothing else is ordered but by the barriers (given by the gap in front of them)."""
    for gaps in itertools.product(range(GAPS), repeat=5):
        if not (gaps[R1] <= gaps[R2] <= gaps[R5] and (leased or gaps[R3] <= gaps[R4])):
            continue
        done = [[gap <= barrier for gap in gaps] for barrier in barriers]
        if all(flags == sorted(flags, reverse=True) for flags in done):
            yield gaps


def run(expert: int, gaps: tuple[int, ...]) -> WeakReader:
    """The reclaimer takes the victim's slot for the new expert, if it may, while a reader reads. Returns the reader."""
    table = TABLE
    table.admit(WORKER)
    table.header[EPOCH] = 1
    table.slot_of[:] = (SLOT, ABSENT)
    memory = [VICTIM]
    reader = WeakReader(table, memory, expert, gaps)
    passed = iter(range(GAPS))

    def pass_gap() -> None:
        reader.pass_gap(next(passed))

    def barrier() -> None:
        pass_gap()
        pass_gap()

    reclaimer = Reclaimer(table, barrier)
    pass_gap()
    reclaimer.retire(ids(VICTIM), ids(SLOT))
    pass_gap()
    if len(reclaimer.reclaim()):
        memory[SLOT] = NEW
        reclaimer.publish(ids(NEW), ids(SLOT))
    for gap in passed:
        reader.pass_gap(gap)
    return reader


TABLE = ResidencyTable.create("test", 2)


def outcomes(barriers: set[int], expert: int, leased: bool) -> Counter[int | None]:
    return Counter(run(expert, gaps).read for gaps in orders(barriers, leased))


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("expert", [VICTIM, NEW])
def test_in_every_order_a_reader_reads_what_it_looked_up(expert: int, leased: bool) -> None:
    seen = outcomes({BEFORE_B1, BEFORE_B2, BEFORE_B3}, expert, leased)
    assert set(seen) == {expert, None}
    assert seen.total() > 500


@pytest.mark.parametrize(
    ("missing", "expert", "leased"),
    [(BEFORE_B1, VICTIM, False), (BEFORE_B2, VICTIM, False), (BEFORE_B3, NEW, True)],
    ids=["B1", "B2", "B3"],
)
def test_every_barrier_is_needed(missing: int, expert: int, leased: bool) -> None:
    """Without any one of them some order gives wrong bytes: this is how the test above would show it."""
    wrong = NEW if expert == VICTIM else VICTIM
    assert outcomes({BEFORE_B1, BEFORE_B2, BEFORE_B3} - {missing}, expert, leased)[wrong] > 0


class Pool:
    """A reclaimer, readers, and what each reader may hold: all slots it could have looked up since it entered."""

    def __init__(self, experts: int, readers: int):
        self.table = ResidencyTable.create("test", experts)
        for worker in range(readers):
            self.table.admit(worker)
        self.readers = [Reader(self.table, worker) for worker in range(readers)]
        self.reclaimer = Reclaimer(self.table)
        self.held: list[set[int] | None] = [None] * readers
        self.free = set(range(experts))
        self.retired: set[int] = set()

    def toggle(self, worker: int) -> None:
        if self.held[worker] is None:
            self.readers[worker].enter()
            self.held[worker] = set(self.table.slot_of[self.table.slot_of != ABSENT].tolist())
        else:
            self.readers[worker].leave()
            self.held[worker] = None

    def publish(self, expert: int) -> None:
        if self.free and self.table.slot_of[expert] == ABSENT:
            slot = self.free.pop()
            self.reclaimer.publish(ids(expert), ids(slot))
            for held in self.held:
                if held is not None:
                    held.add(slot)

    def retire(self, count: int) -> None:
        experts = np.flatnonzero(self.table.slot_of != ABSENT)[:count]
        if len(experts):
            slots = self.table.slot_of[experts].tolist()
            self.reclaimer.retire(experts, np.array(slots))
            self.retired.update(slots)
            assert (self.table.slot_of[experts] == ABSENT).all()

    def reclaim(self) -> None:
        given = self.reclaimer.reclaim().tolist()
        assert len(set(given)) == len(given) and set(given) <= self.retired
        for held in self.held:
            assert held is None or not held & set(given)
        self.retired -= set(given)
        self.free |= set(given)
        assert self.reclaimer.waiting == len(self.retired)
        assert not self.retired or any(held is not None for held in self.held)


steps = st.tuples(st.sampled_from(["toggle", "publish", "retire", "reclaim"]), st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=80))
def test_a_slot_comes_back_once_and_only_when_nobody_holds_it(does: list[tuple[str, int]]) -> None:
    pool = Pool(experts=4, readers=4)
    for verb, number in does:
        method: Callable[..., None] = getattr(pool, verb)
        method(*([] if verb == "reclaim" else [number]))
    for worker, held in enumerate(pool.held):
        if held is not None:
            pool.toggle(worker)
    pool.reclaim()
    assert not pool.retired, "slots stay retired although nobody reads"
    pool.table.close()


def test_a_reader_that_comes_later_holds_nothing_up() -> None:
    pool = Pool(experts=2, readers=2)
    pool.publish(0)
    pool.toggle(0)
    pool.retire(1)
    pool.toggle(1)
    assert len(pool.reclaimer.reclaim()) == 0
    pool.toggle(0)
    assert len(pool.reclaimer.reclaim()) == 1 and pool.held[1] is not None


DIE_READING = """
import sys
from vllm_moe_offload.ipc.epochs import Reader
from vllm_moe_offload.ipc.table import ResidencyTable
reader = Reader(ResidencyTable.attach(int(sys.argv[1]), 2), 1)
reader.enter()
print("reading", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_reader_held_comes_back_when_its_entry_is_cleared() -> None:
    table = ResidencyTable.create("test", 2)
    table.admit(WORKER)
    reclaimer = Reclaimer(table)
    reclaimer.publish(ids(0), ids(1))
    fd = table.mapping.fd
    child = subprocess.Popen(
        [sys.executable, "-c", DIE_READING, str(fd)], pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"reading\n"
    reclaimer.retire(ids(0), ids(1))
    assert len(reclaimer.reclaim()) == 0
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(reclaimer.reclaim()) == 0
    table.clear(WORKER)
    assert reclaimer.reclaim().tolist() == [1]
