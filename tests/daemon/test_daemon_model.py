"""Models by name, sharing one budget, attached to by workers of this and of other processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.wire import wait_until
from tests.runtime.record_stores import ALIGNED, MIXED, RecordStore, build_store
from vllm_moe_offload.daemon import model as daemon_model
from vllm_moe_offload.daemon import models as daemon_models
from vllm_moe_offload.daemon.models import DaemonModels
from vllm_moe_offload.daemon.workers import Worker
from vllm_moe_offload.errors import ConfigError, LoadError, OffloadError, StoreError
from vllm_moe_offload.ipc.arena import Arena
from vllm_moe_offload.ipc.epochs import Reader
from vllm_moe_offload.ipc.protocol import Attach, Demand, Hint, ImportSlots, Supplied, pack_ids, unpack_ids
from vllm_moe_offload.ipc.table import ABSENT, DONE, ResidencyTable
from vllm_moe_offload.store import RecordLayout

LAYERS, EXPERTS = 4, 8
N = LAYERS * EXPERTS
RECORD = ALIGNED.payload_bytes
FULL = N * RECORD


def model(root: Path, seed: int = 0, layouts: tuple[RecordLayout, ...] = (ALIGNED,) * LAYERS) -> RecordStore:
    return build_store(root, [(layout, EXPERTS) for layout in layouts], seed)


@contextlib.contextmanager
def hosting(root: Path, budget: int = FULL, shares: dict[str, int] | None = None) -> Iterator[DaemonModels]:
    models = DaemonModels(root, budget, shares or {}, "lfu", None)
    try:
        yield models
    finally:
        for model in models._models.values():
            for worker in list(model.workers.values()):
                worker.detach()
        models.close()


def ask(
    built: RecordStore | str, wanted: int = FULL, lease: bool = False, group: str = "", pid: int = 1, rank: int = 0
) -> Attach:
    name = built if isinstance(built, str) else built.store.path.name
    return Attach(name, pid, wanted, lease, group, rank)


class Engine:
    """The engine's side of a worker over its descriptors, as another process would have them."""

    def __init__(self, built: RecordStore, worker: Worker):
        self.built, self.worker = built, worker
        layouts = list(dict.fromkeys(entry.layout for entry in built.store.layers))
        fds = [os.dup(fd) for fd in worker.fds]
        infos = worker.reply.pools
        self.arenas = [
            Arena.attach(fd, layout, info.experts) for fd, layout, info in zip(fds[::2], layouts, infos, strict=True)
        ]
        self.tables = [ResidencyTable.attach(fd, info.experts) for fd, info in zip(fds[1::2], infos, strict=True)]
        self.places = [
            [
                (i, e)
                for i, entry in enumerate(built.store.layers)
                if entry.layout == layout
                for e in range(entry.experts)
            ]
            for layout in layouts
        ]
        self.ticket = 0

    def demand(self, experts: list[int], pool: int = 0) -> Supplied:
        self.ticket += 1
        reply = self.worker.demand(Demand(self.ticket, pool, pack_ids(np.array(experts))))
        assert not reply.failed
        self.check(experts, unpack_ids(reply.slots).tolist(), pool)
        self.tables[pool].entries[self.worker.entry, DONE] = self.ticket
        return reply

    def check(self, experts: list[int], slots: list[int], pool: int = 0) -> None:
        for expert, slot in zip(experts, slots, strict=True):
            layer, number = self.places[pool][expert]
            found = self.arenas[pool].slot(slot)
            assert all(np.array_equal(a, b) for a, b in zip(found, self.built.records[layer][number], strict=True)), (
                f"slot {slot} does not hold expert {expert}"
            )

    def use_everything(self) -> None:
        for first in range(0, N, EXPERTS):
            self.demand(list(range(first, first + EXPERTS)))


def memory(worker: Worker) -> int:
    return sum(os.fstat(fd).st_blocks * 512 for fd in worker.fds[::2])


def test_two_workers_share_a_model_and_a_third_finds_it_warm(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path) as models:
        first, second = (Engine(built, models.attach(ask(built))) for _ in range(2))
        assert {first.worker.entry, second.worker.entry} == {0, 1}
        assert first.demand([0, 5, 9]).loaded == 3
        assert second.demand([5, 9, 11]).loaded == 1
        first.worker.detach()
        second.worker.detach()
        second.worker.detach()
        third = Engine(built, models.attach(ask(built)))
        assert third.worker.entry == 2, "the entry of one that may still read was given away at once"
        assert (third.tables[0].slot_of[[0, 5, 9, 11]] != ABSENT).all()
        assert third.demand([0, 5, 9, 11]).loaded == 0
        status = models.status()[0]
        assert status.stats["resident_experts"] == 4 and status.stats["loads"] == 4 and len(status.workers) == 1


def test_what_a_worker_reads_stays_when_the_daemon_ends_first(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path) as models:
        engine = Engine(built, models.attach(ask(built)))
        engine.demand([0, 5])
        models.freeze()
        engine.worker.detach()
        assert [status.pid for status in models.status()[0].workers] == [1], "it is not detached any more"
        assert engine.tables[0].frozen and (engine.tables[0].slot_of[[0, 5]] != ABSENT).all()


def test_layers_of_different_layouts_have_pools_of_their_own(tmp_path: Path) -> None:
    built = model(tmp_path, layouts=(ALIGNED, MIXED, ALIGNED, MIXED))
    with hosting(tmp_path, budget=2 * FULL) as models:
        engine = Engine(built, models.attach(ask(built)))
        assert [info.experts for info in engine.worker.reply.pools] == [16, 16]
        for pool in (0, 1):
            engine.ticket = 0
            engine.demand([1, 7, 9, 14], pool)
        with pytest.raises(ValueError, match="no pool 2"):
            engine.worker.demand(Demand(9, 2, b""))


@pytest.mark.parametrize("name", ["", "..", "../x", "0" * 31, "0" * 33, "G" * 32, "/" + "0" * 31, "0" * 32 + "\n"])
def test_only_names_of_stores_are_looked_for(tmp_path: Path, name: str) -> None:
    with hosting(tmp_path) as models, pytest.raises(StoreError, match="32 hexadecimal digits"):
        models.attach(ask(name))


def test_stores_that_are_absent_damaged_or_misnamed_are_refused_with_the_fix(tmp_path: Path) -> None:
    built, other = model(tmp_path), model(tmp_path, seed=1)
    with hosting(tmp_path) as models:
        with pytest.raises(StoreError, match=rf"no store {'0' * 32} in {tmp_path}.*--store folder"):
            models.attach(ask("0" * 32))
        built.store.path.rename(tmp_path / ("a" * 32))
        with pytest.raises(StoreError, match="was built as"):
            models.attach(ask("a" * 32))
        with (other.store.path / "records.bin").open("ab") as file:
            file.write(b"x")
        with pytest.raises(StoreError, match="cannot be used"):
            models.attach(ask(other))
        assert models.status() == []


def test_a_store_built_anew_is_another_model(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path, budget=2 * FULL) as models:
        old = Engine(built, models.attach(ask(built)))
        old.demand([3])
        built.store.path.rename(tmp_path / f"{built.store.path.name}.damaged-1")
        again = model(tmp_path)
        new = Engine(again, models.attach(ask(again)))
        assert new.demand([3]).loaded == 1
        assert old.demand([3]).loaded == 0


def test_a_lease_is_granted_when_everything_fits_and_kept(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path) as models:
        other = Engine(built, models.attach(ask(built, wanted=10 * RECORD)))
        other.demand([9, 3])
        leasing = Engine(built, models.attach(ask(built, lease=True)))
        assert leasing.worker.reply.lease
        leasing.check(list(range(N)), list(range(N)))
        assert leasing.tables[0].slot_of.tolist() == list(range(N))
        newcomer = model(tmp_path, seed=1)
        with pytest.raises(
            ConfigError, match=r"--cache 384KiB of the daemon is too little.*the least that works is 480KiB"
        ):
            models.attach(ask(newcomer))
        leasing.worker.detach()
        Engine(newcomer, models.attach(ask(newcomer))).demand([1, 2])


def test_a_lease_that_does_not_fit_is_not_granted_and_the_worker_is_served_all_the_same(
    tmp_path: Path, said: list[str]
) -> None:
    built = model(tmp_path)
    with hosting(tmp_path, budget=FULL - 1) as models:
        engine = Engine(built, models.attach(ask(built, lease=True)))
        assert not engine.worker.reply.lease
        assert engine.worker.reply.pools[0].limit == N - 1
        engine.use_everything()
        assert any("can be spared" in line for line in said)


def test_a_lease_of_a_damaged_record_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    built = model(tmp_path)
    built.flip(2, 3)
    with hosting(tmp_path) as models:
        with pytest.raises(LoadError, match=r"expert 3 of layer 2.*checksum"):
            models.attach(ask(built, lease=True))
        assert models.status()[0].workers == []
        engine = Engine(built, models.attach(ask(built)))
        assert engine.worker.entry == 1
        engine.demand([0, 1])


def test_two_models_stay_within_the_budget_and_move_memory_to_who_misses(tmp_path: Path) -> None:
    first, second = model(tmp_path), model(tmp_path, seed=1)
    with hosting(tmp_path, budget=FULL) as models:
        one = Engine(first, models.attach(ask(first)))
        one.use_everything()
        assert memory(one.worker) == FULL
        two = Engine(second, models.attach(ask(second)))
        two.use_everything()
        assert memory(one.worker) + memory(two.worker) <= FULL
        limits = [status.stats["slots"] for status in models.status()]
        assert abs(limits[0] - limits[1]) <= 1 and sum(limits) in (N - 1, N)
        opened = list(models._models.values())
        opened[1].pressure = 1e9
        for _ in range(20):
            models.rebalance()
            assert memory(one.worker) + memory(two.worker) <= FULL
        assert opened[1].pools[0].limit > 2 * opened[0].pools[0].limit >= 2 * EXPERTS
        one.use_everything()
        two.use_everything()
        assert memory(one.worker) + memory(two.worker) <= FULL


def test_a_model_nobody_uses_makes_way_and_is_forgotten_at_last(tmp_path: Path) -> None:
    first, second = model(tmp_path), model(tmp_path, seed=1)
    with hosting(tmp_path, budget=FULL) as models:
        one = Engine(first, models.attach(ask(first)))
        one.use_everything()
        one.worker.detach()
        two = Engine(second, models.attach(ask(second, wanted=FULL // 2)))
        assert [status.stats["resident_experts"] for status in models.status()] == [N // 2, 0]
        models.attach(ask(second, wanted=FULL))
        assert [status.store for status in models.status()] == [second.store.path.name]
        two.use_everything()


def test_the_operators_share_is_kept_and_named_when_it_is_too_small(tmp_path: Path) -> None:
    built, name = model(tmp_path), ""
    name = built.store.path.name
    with hosting(tmp_path, shares={name: 10 * RECORD}) as models:
        engine = Engine(built, models.attach(ask(built)))
        engine.use_everything()
        assert models.status()[0].stats["slots"] == 10 and memory(engine.worker) == 10 * RECORD
    with hosting(tmp_path, shares={name: 2 * RECORD}) as models, pytest.raises(ConfigError) as caught:
        models.attach(ask(built))
    assert f"--share {name}: 24KiB is too little" in str(caught.value) and "works is 96KiB" in str(caught.value)


def test_a_small_budget_serves_who_asked_for_little_and_names_what_would_do_otherwise(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path, budget=4 * RECORD) as models:
        with pytest.raises(
            ConfigError, match=r"--cache 48KiB of the daemon is too little.*the least that works is 96KiB"
        ):
            models.attach(ask(built))
        engine = Engine(built, models.attach(ask(built, wanted=3 * RECORD)))
        for first in range(0, N, 4):
            engine.demand(list(range(first, first + 4)))
        assert memory(engine.worker) == 4 * RECORD


@pytest.mark.parametrize("first", ["modest", "greedy"])
def test_models_that_fit_together_fit_in_either_order(tmp_path: Path, first: str) -> None:
    """What a model is promised does not depend on what was free when its first engine came."""
    modest, greedy = model(tmp_path), model(tmp_path, seed=1)
    wanted = {"modest": ask(modest, wanted=3 * RECORD), "greedy": ask(greedy, wanted=FULL)}
    with hosting(tmp_path, budget=12 * RECORD) as models:
        attached = {name: models.attach(wanted[name]) for name in sorted(wanted, key=lambda name: name != first)}
        Engine(modest, attached["modest"]).use_everything()
        Engine(greedy, attached["greedy"]).use_everything()
        limits = {status.store: status.stats["slots"] for status in models.status()}
        assert limits[modest.store.path.name] >= 3 and limits[greedy.store.path.name] >= EXPERTS
        attached["greedy"].detach()
        models.attach(ask(greedy, wanted=2 * RECORD))


def test_what_is_promised_ends_with_the_worker_it_was_promised_to(tmp_path: Path) -> None:
    built, other = model(tmp_path), model(tmp_path, seed=1)
    with hosting(tmp_path, budget=12 * RECORD) as models:
        models.attach(ask(built, wanted=3 * RECORD))
        large = models.attach(ask(built, wanted=FULL))
        with pytest.raises(ConfigError, match=r"96KiB are promised to"):
            models.attach(ask(other))
        large.detach()
        models.attach(ask(other))


def test_a_step_cut_up_before_its_model_shrank_is_served(tmp_path: Path) -> None:
    first, second = model(tmp_path), model(tmp_path, seed=1)
    with hosting(tmp_path, budget=FULL) as models:
        engine = Engine(first, models.attach(ask(first, wanted=2 * RECORD)))
        assert engine.worker.reply.pools[0].limit == N
        models.attach(ask(second))
        assert engine.tables[0].limit < EXPERTS
        engine.use_everything()


def test_memory_is_looked_after_whatever_has_gone_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_models, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(daemon_model, "_LOOK_SECONDS", 0.01)
    built = model(tmp_path)
    with hosting(tmp_path) as models:
        engine = Engine(built, models.attach(ask(built)))
        pool = next(iter(models._models.values())).pools[0]
        maintain, rebalance, looked = pool.run_maintenance, models.rebalance, threading.Event()

        def fail() -> bool:
            raise RuntimeError("unheard of")

        def look() -> None:
            rebalance()
            looked.set()

        monkeypatch.setattr(pool, "run_maintenance", fail)
        monkeypatch.setattr(models, "rebalance", fail)

        def failures() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

        wait_until(lambda: len(failures()) >= 2, "both have said so")
        assert sorted(line.split(";")[0] for line in failures()) == [
            f"slots of store {built.store.path.name} could not be reclaimed",
            "the memory could not be divided anew",
        ], "said once, however often it happens"
        assert all("RuntimeError: unheard of" in line for line in failures())
        monkeypatch.setattr(pool, "run_maintenance", maintain)
        monkeypatch.setattr(models, "rebalance", look)
        assert looked.wait(60)
        engine.use_everything()
        pool.limit = 2
        wait_until(lambda: pool.held == 2, "slots are reclaimed again")


def test_hints_reach_the_other_ranks_of_an_engine_and_nobody_else(tmp_path: Path) -> None:
    ranks = [model(tmp_path, seed=seed) for seed in (0, 1, 2)]
    with hosting(tmp_path, budget=3 * FULL) as models:
        one = Engine(ranks[0], models.attach(ask(ranks[0], group="g", rank=0)))
        two = Engine(ranks[1], models.attach(ask(ranks[1], group="g", rank=1)))
        stranger = Engine(ranks[2], models.attach(ask(ranks[2], group="h")))
        one.worker.hint(Hint(0, pack_ids(np.array([4, 6]))))
        for engine in (one, two):
            while (engine.tables[0].slot_of[[4, 6]] == ABSENT).any():
                pass
            assert engine.demand([4, 6]).loaded == 0
        assert (stranger.tables[0].slot_of == ABSENT).all() and not stranger.tables[0].loading.any()


def test_a_new_daemon_takes_over_what_an_engine_still_has(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path) as old:
        engine = Engine(built, old.attach(ask(built)))
        engine.demand([1, 2, 30])
    with hosting(tmp_path) as new:
        worker = new.attach(ask(built))
        experts = np.flatnonzero(engine.tables[0].slot_of != ABSENT)
        slots = engine.tables[0].slot_of[experts]
        offer = ImportSlots(0, pack_ids(experts), pack_ids(slots))
        assert worker.import_slots(offer, os.dup(engine.arenas[0].mapping.fd)).records == 3
        again = Engine(built, worker)
        assert again.demand([1, 2, 30]).loaded == 0
        for fd in (os.memfd_create("x"), os.open("/dev/null", os.O_RDONLY)):
            with pytest.raises(ValueError):
                worker.import_slots(offer, fd)
            with pytest.raises(OSError):
                os.fstat(fd)
        assert new.status()[0].stats["imported"] == 3


def test_no_more_than_64_workers_of_a_model(tmp_path: Path) -> None:
    built = model(tmp_path)
    with hosting(tmp_path) as models:
        attached = [models.attach(ask(built)) for _ in range(64)]
        with pytest.raises(OffloadError, match="64 workers are attached"):
            models.attach(ask(built))
        attached[17].detach()
        assert models.attach(ask(built)).entry == 17


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open_when_models_are_closed(tmp_path: Path) -> None:
    built = model(tmp_path)
    before, threads = open_files(), threading.active_count()
    for _ in range(3):
        with hosting(tmp_path) as models:
            worker = models.attach(ask(built))
            worker.demand(Demand(1, 0, pack_ids(np.array([1, 2]))))
    assert open_files() == before
    assert threading.active_count() == threads


def _read_in_place(engine: Engine, turns: int, seed: int, demands, answers, ready) -> None:
    """In a process of its own: computes on what it finds, asks over a pipe for what it does not, checks all bytes."""
    draw = np.random.default_rng(seed)
    worker, table = engine.worker.entry, engine.tables[0]
    reader = Reader(table, worker)
    ready.set()
    hits = ticket = 0
    for turn in range(turns):
        layer = turn % LAYERS
        experts = (layer * EXPERTS + draw.permutation(EXPERTS)[:3]).tolist()
        reader.enter()
        slots = table.slot_of[experts]
        if (slots != ABSENT).all():
            engine.check(experts, slots.tolist())
            reader.leave()
            hits += 1
            continue
        reader.leave()
        ticket += 1
        demands.send((ticket, experts))
        engine.check(experts, answers.recv())
        table.entries[worker, DONE] = ticket
    demands.send((0, [hits]))


def test_processes_read_in_place_what_others_evict(tmp_path: Path) -> None:
    built = model(tmp_path)
    context = multiprocessing.get_context("fork")
    with hosting(tmp_path, budget=14 * RECORD) as models:
        hits = []

        def serve(seed: int) -> None:
            worker = models.attach(ask(built, wanted=8 * RECORD))
            engine = Engine(built, worker)
            (theirs, ours), (back, forth), ready = context.Pipe(), context.Pipe(), context.Event()
            process = context.Process(target=_read_in_place, args=(engine, 3000, seed, ours, forth, ready))
            process.start()
            ours.close()
            while True:
                ticket, experts = theirs.recv()
                if ticket == 0:
                    hits.append(experts[0])
                    break
                reply = worker.demand(Demand(ticket, 0, pack_ids(np.array(experts))))
                back.send(unpack_ids(reply.slots).tolist())
            process.join(60)
            assert process.exitcode == 0
            worker.detach()

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert len(hits) == 3 and sum(hits) > 0
        status = models.status()[0]
        assert status.stats["loads"] > N and status.stats["resident_experts"] <= 14


def test_an_engine_killed_in_the_middle_of_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    built = model(tmp_path)
    context = multiprocessing.get_context("fork")
    with hosting(tmp_path, budget=EXPERTS * RECORD) as models:
        worker = models.attach(ask(built))
        engine = Engine(built, worker)
        engine.demand(list(range(EXPERTS)))
        inside = context.Event()

        def hang() -> None:
            Reader(engine.tables[0], worker.entry).enter()
            inside.set()
            signal.pause()

        process = context.Process(target=hang)
        process.start()
        assert inside.wait(30)
        process.kill()
        process.join()
        other = Engine(built, models.attach(ask(built)))
        worker.detach()
        other.demand(list(range(8, 16)))
        assert models.status()[0].stats["resident_experts"] == EXPERTS
