"""Reading shared slots without asking, under evictions as violent as possible: is a wrong byte ever computed on?

One process plays the daemon: it takes experts away from the readers and overwrites their slots without pause, first
with rubbish, then with another expert's record. Several others play engines: enter, look up, verify the checksum of
every record found, linger, verify again, leave. A record says which expert it is; its bytes depend on its generation.

    python benchmarks/daemon_stress.py --readers 3 --acquisitions 3000000
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from vllm_moe_offload.ipc.arena import Arena
from vllm_moe_offload.ipc.epochs import Reader, Reclaimer
from vllm_moe_offload.ipc.table import ABSENT, ResidencyTable
from vllm_moe_offload.store.layout import Component, RecordLayout

LAYOUT = RecordLayout((Component("payload", "uint8", (2048,), 2048), Component("label", "int64", (2,), 16)))
RUBBISH = 0xEE
ENOUGH_WRONG = 10


@dataclass(frozen=True)
class Violence:
    """What is done to whom."""

    readers: int = 2
    experts: int = 64
    limit: int = 12
    """Slots in use: few, so that everything is evicted soon."""
    at_once: int = 4
    """Experts a reader looks up in one acquisition."""
    seed: int = 0


@dataclass
class Outcome:
    """What was counted over all processes."""

    acquisitions: int = 0
    """Times a reader entered, found at least one expert, verified what it found twice, and left."""
    records: int = 0
    """Verified, each of them twice."""
    taken: int = 0
    """Of these, evicted by the time they were verified again."""
    wrong: int = 0
    """Records that were not what had been looked up, or did not stay so."""
    evictions: int = 0
    held_up: int = 0
    """Times the daemon asked for slots and readers held all that were retired."""
    lost_slots: int = 0
    """Slots that had not come back in the end, when nobody read any more."""
    seconds: float = 0.0


def fill(arena: Arena, slot: int, expert: int, generation: int) -> None:
    """Write a record over what was there, in more than one go."""
    payload, label = arena.slot(slot)
    payload[:] = RUBBISH
    label[:] = RUBBISH
    payload[:] = (expert * 31 + generation * 17) & 0xFF
    payload[:16].view(np.int64)[:] = (expert, generation)
    label[:8].view(np.int64)[0] = expert
    label[8:].view(np.uint64)[0] = xxhash.xxh3_64_intdigest(payload.data)


def is_right(arena: Arena, slot: int, expert: int) -> bool:
    """Whether a slot holds a whole record of this expert."""
    payload, label = arena.components[0][slot], arena.components[1][slot].view(np.uint64)
    return label[0] == expert and label[1] == xxhash.xxh3_64_intdigest(payload.data)


def engine(violence: Violence, worker: int, arena_path: str, table_path: str) -> None:
    """Acquire until told to stop; what was found is written to the worker's row of counters."""
    arena = Arena.attach(os.open(arena_path, os.O_RDONLY), LAYOUT, violence.experts)
    table = ResidencyTable.attach(os.open(table_path, os.O_RDWR), violence.experts)
    reader = Reader(table, worker)
    draw = random.Random(f"{violence.seed} {worker}")
    tally = table.stats[worker, :4]
    while not table.frozen:
        for _ in range(64):
            tally += acquire(reader, arena, table, draw, violence.at_once)


def acquire(
    reader: Reader, arena: Arena, table: ResidencyTable, draw: random.Random, at_once: int
) -> tuple[int, int, int, int]:
    """Compute on experts that were resident a moment ago: acquisitions, records, taken, wrong as in Outcome."""
    resident = np.flatnonzero(table.slot_of != ABSENT)
    start = draw.randrange(max(1, len(resident) - at_once + 1))
    experts = resident[start : start + at_once]
    reader.enter()
    slots = table.slot_of[experts]
    found = [(slot, expert) for slot, expert in zip(slots.tolist(), experts.tolist(), strict=True) if slot != ABSENT]
    before = [is_right(arena, slot, expert) for slot, expert in found]
    linger(draw.randrange(64))
    taken = int(np.count_nonzero((table.slot_of[experts] != slots) & (slots != ABSENT)))
    after = [is_right(arena, slot, expert) for slot, expert in found]
    reader.leave()
    wrong = sum(not (once and again) for once, again in zip(before, after, strict=True))
    return bool(found), len(found), taken, wrong


def linger(choice: int) -> None:
    """Mostly go on at once; now and then let others run, or sleep, while holding slots."""
    if choice == 0:
        time.sleep(0.0002)
    elif choice < 8:
        os.sched_yield()


class Evictor:
    """The daemon's part: takes and refills slots as fast as readers let go of them."""

    def __init__(self, violence: Violence, reclaimer: Callable[[ResidencyTable], Reclaimer]):
        self.arena = Arena.create("stress-arena", LAYOUT, violence.experts)
        self.table = ResidencyTable.create("stress-table", violence.experts)
        for worker in range(violence.readers):
            self.table.admit(worker)
        self.reclaimer = reclaimer(self.table)
        self.draw = random.Random(violence.seed)
        self.slot_of: dict[int, int] = {}
        self.absent = list(range(violence.experts))
        self.free = list(range(violence.limit))
        self.generation = 0
        self.evictions = 0
        self.held_up = 0

    def load(self) -> None:
        """Fill every free slot with an expert that has none."""
        experts = self.draw.sample(self.absent, len(self.free))
        for expert, slot in zip(experts, self.free, strict=True):
            self.generation += 1
            fill(self.arena, slot, expert, self.generation)
            self.absent.remove(expert)
            self.slot_of[expert] = slot
        self.reclaimer.publish(np.array(experts, dtype=np.int64), np.array(self.free, dtype=np.int64))
        self.free = []

    def evict(self) -> None:
        """Take some experts out, and load others as soon as a slot may be written."""
        victims = self.draw.sample(sorted(self.slot_of), self.draw.randint(0, len(self.slot_of)))
        if victims:
            self.reclaimer.retire(np.array(victims), np.array([self.slot_of.pop(expert) for expert in victims]))
            self.absent += victims
            self.evictions += len(victims)
        self.free = self.reclaimer.reclaim().tolist()
        if self.free:
            self.load()
        elif self.reclaimer.waiting:
            self.held_up += 1
            os.sched_yield()


def run(
    violence: Violence,
    acquisitions: int,
    reclaimer: Callable[[ResidencyTable], Reclaimer] = Reclaimer,
    patience_seconds: float = 600,
) -> Outcome:
    """Evict until the readers have made so many acquisitions together, or met a few wrong records.

    Raises:
        RuntimeError: a reader ended by itself, or patience did.
    """
    evictor = Evictor(violence, reclaimer)
    table, arena = evictor.table, evictor.arena
    evictor.load()
    context = multiprocessing.get_context("spawn")
    paths = [f"/proc/{os.getpid()}/fd/{mapping.fd}" for mapping in (arena.mapping, table.mapping)]
    engines = [
        context.Process(target=engine, args=(violence, worker, *paths), daemon=True)
        for worker in range(violence.readers)
    ]
    for process in engines:
        process.start()
    started = time.monotonic()
    try:
        while table.stats[:, 0].sum() < acquisitions and table.stats[:, 3].sum() <= ENOUGH_WRONG:
            for _ in range(64):
                evictor.evict()
            ended = [process.exitcode for process in engines if not process.is_alive()]
            if ended or time.monotonic() - started > patience_seconds:
                raise RuntimeError(f"readers ended: {ended}, after {time.monotonic() - started:.0f} s")
    finally:
        table.freeze()
        for process in engines:
            process.join()
    seconds = time.monotonic() - started
    returned = len(evictor.reclaimer.reclaim()) + len(evictor.slot_of)
    counted = table.stats[:, :4].sum(axis=0).tolist()
    table.close()
    arena.mapping.close()
    return Outcome(*counted, evictor.evictions, evictor.held_up, violence.limit - returned, seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--acquisitions", type=int, default=3_000_000, help="of all readers together")
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--limit", type=int, default=12, help="slots in use")
    parser.add_argument("--at-once", type=int, default=4, help="experts per acquisition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=3600, help="seconds after which it gives up")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    violence = Violence(options.readers, options.experts, options.limit, options.at_once, options.seed)
    result = {**asdict(violence), **asdict(run(violence, options.acquisitions, patience_seconds=options.patience))}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    raise SystemExit(bool(result["wrong"] or result["lost_slots"]))


if __name__ == "__main__":
    main()
