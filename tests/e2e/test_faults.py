"""Disks fill up, bits flip, stores vanish and builders are killed: never a wrong token, never a dead engine."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.asynchronous import in_force, schedule_asynchronously, use_v2_runner
from tests.e2e.live_engine import Answer, EngineError, LiveEngine
from tests.models.architectures import qwen3_moe
from tests.models.recipe import Checkpoint, write
from vllm_moe_offload.store import Store, StoreRoot
from vllm_moe_offload.trace.trace_file import read_trace

EXPERTS = 64
Spawn = Callable[..., LiveEngine]
V1_OR_V2 = "vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu.model_runner"


def prompt(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 500) for _ in range(length)]


SHORT, OTHER, LONG = prompt(1, 2), prompt(2, 3), prompt(3, 80)
"""Two that use few experts, and one that fills two blocks of KV cache and more."""
PREFIX = prompt(4, 64)
FIRST, SECOND = [*PREFIX, 7], [*PREFIX, 8]
"""Two that share two whole blocks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """256 experts of 48 KiB, so that short prompts leave most of them alone."""
    return write(qwen3_moe(count=EXPERTS), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Make engine processes; what still runs at the end is killed."""
    engines: list[LiveEngine] = []

    def make(fresh: bool = False, **environment: str) -> LiveEngine:
        engines.append(LiveEngine(tmp_path / f"engine{len(engines)}.log", fresh, **environment))
        return engines[-1]

    yield make
    for engine in engines:
        engine.process.kill()
        engine.process.join()


class Healthy(NamedTuple):
    """How things are while nothing is wrong."""

    answers: dict[str, Answer]
    """By prompt, from unmodified vLLM, each alone."""
    routes: dict[str, set[tuple[int, int]]]
    """(layer, expert) that each prompt needs, alone in a fresh engine but for what a prefix cache holds."""
    stores: Path
    """A root with a whole store, not to be touched."""


@pytest.fixture(scope="module")
def healthy(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    folder = tmp_path_factory.mktemp("healthy")
    prompts = [SHORT, OTHER, LONG, PREFIX, FIRST, SECOND]
    plain = LiveEngine(folder / "plain.log", VLLM_PLUGINS="")
    plain.start(checkpoint.path, checkpoint.engine_args)
    answers = {str(ids): plain.generate([ids])[0] for ids in prompts}
    plain.close()
    engine, routes = LiveEngine(folder / "healthy.log"), {}
    engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(folder / "stores"))
    for ids in prompts:
        assert engine.generate([ids]) == [answers[str(ids)]]
        routes[str(ids)] = engine.routes()
    engine.close()
    return Healthy(answers, routes, folder / "stores")


class DiskStore:
    """A store of a test's own, and a hand on its record file wherever it is moved to."""

    def __init__(self, root: Path):
        self.root = StoreRoot(root)
        (info,) = self.root.ls()
        self.store = Store.open(info.path)
        self._file = (info.path / "records.bin").open("r+b", buffering=0)

    def flip(self, layer: int, expert: int) -> None:
        """Turn bits of a whole component around, so that what is computed with it is far off; a second time, back."""
        offset, size = self.store.offset(layer, expert), self.store.layers[layer].layout.components[0].nbytes
        right = os.pread(self._file.fileno(), size, offset)
        os.pwrite(self._file.fileno(), bytes(byte ^ 9 for byte in right), offset)

    def close(self) -> None:
        self._file.close()
        self.store.close()


@pytest.fixture
def disk(healthy: Healthy, tmp_path: Path) -> Iterator[DiskStore]:
    shutil.copytree(healthy.stores, tmp_path / "stores")
    store = DiskStore(tmp_path / "stores")
    yield store
    store.close()


def only_in(needed: set[tuple[int, int]], *others: set[tuple[int, int]]) -> tuple[int, int]:
    """A record of the first layer, so that what is void becomes KV cache of the others."""
    return next(record for record in sorted(needed.difference(*others)) if record[0] == 0)


def assert_failed(answer: Answer, record: tuple[int, int]) -> None:
    assert answer.finish_reason == "error"
    assert isinstance(answer.stop_reason, str)
    assert f"expert {record[1]} of model.layers.{record[0]}." in answer.stop_reason
    assert "attempt 2 of 2): its checksum does not match" in answer.stop_reason


def test_a_record_flipped_under_a_running_engine(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn
) -> None:
    right = healthy.answers
    record = only_in(healthy.routes[str(LONG)], healthy.routes[str(SHORT)], healthy.routes[str(OTHER)])
    engine = spawn()
    engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(disk.root.path))
    disk.flip(*record)
    short, long, other = engine.generate([SHORT, LONG, OTHER])
    assert (short, other) == (right[str(SHORT)], right[str(OTHER)])
    assert_failed(long, record)
    assert engine.generate([OTHER, SHORT]) == [right[str(OTHER)], right[str(SHORT)]]
    assert_failed(engine.generate([LONG])[0], record)
    assert engine.stats()["failed_loads"] >= 2

    disk.flip(*record)
    assert engine.generate([LONG]) == [right[str(LONG)]], "the prefix cache kept void blocks"
    disk.flip(*record)
    engine.close()

    assert [info.state for info in disk.root.ls()] == ["damaged"]
    assert "checksum" in disk.root.ls()[0].detail
    following = spawn()
    following.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(disk.root.path))
    assert "building store" in following.log.read_text()
    assert following.generate([LONG]) == [right[str(LONG)]]
    assert [info.state for info in disk.root.ls()] == ["complete"]
    following.close()


@pytest.mark.parametrize("v2", [False, True])
def test_two_steps_in_flight_when_the_first_fails(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn, tmp_path: Path, v2: bool
) -> None:
    """Asynchronous scheduling, by both of vLLM's model runners; the trace knows whose rows are whose."""
    right = healthy.answers
    record = only_in(healthy.routes[str(LONG)], healthy.routes[str(SHORT)], healthy.routes[str(OTHER)])
    engine = spawn(fresh=v2)
    if v2:
        pytest.importorskip("triton")
        engine.run(use_v2_runner)
    engine.run(schedule_asynchronously)
    trace = tmp_path / "asynchronous.trace"
    settings = {"predictor": "none", "cache": "25%", "store": str(disk.root.path), "trace": str(trace)}
    engine.start(checkpoint.path, checkpoint.engine_args | {"max_num_batched_tokens": 40}, **settings)
    assert engine.call(in_force) == (True, V1_OR_V2[v2])
    disk.flip(*record)
    short, long, other = engine.generate([SHORT, LONG, OTHER])
    assert (short, other) == (right[str(SHORT)], right[str(OTHER)])
    assert_failed(long, record)
    assert long.tokens == []
    disk.flip(*record)
    assert engine.generate([LONG]) == [right[str(LONG)]], "the prefix cache kept void blocks"
    engine.stop()
    recorded = {tuple(request.tokens.tolist()): request for request in read_trace(trace).requests()}
    for ids in (SHORT, OTHER):
        request = recorded[*ids, *right[str(ids)].tokens[:-1]]
        chosen = {
            (layer, int(expert)) for layer in range(request.shape[0]) for expert in request.experts[:, layer].flat
        }
        assert chosen == healthy.routes[str(ids)]
    engine.close()


def test_a_pooling_model_gives_an_error_and_never_numbers(tiny_moe: Path, tmp_path: Path, spawn: Spawn) -> None:
    """Pooled results come out of the forward pass itself: nothing is sampled."""
    pooling = {"dtype": "bfloat16", "runner": "pooling", "convert": "embed"}
    plain = spawn(VLLM_PLUGINS="")
    plain.start(tiny_moe, pooling)
    right = plain.embed([SHORT, LONG, OTHER])
    assert [error for _, error in right] == [None] * 3
    plain.close()
    engine = spawn()
    settings = {"predictor": "none", "cache": "25%", "store": str(tmp_path / "pooling")}
    engine.start(tiny_moe, pooling, **settings)
    routes = {}
    for name, prompt in (("short", SHORT), ("long", LONG), ("other", OTHER)):
        engine.embed([prompt])
        routes[name] = engine.routes()
    engine.stop()
    record = only_in(routes["long"], routes["short"], routes["other"])
    disk = DiskStore(tmp_path / "pooling")
    disk.flip(*record)
    engine.start(tiny_moe, pooling, **settings)
    short, long, other = engine.embed([SHORT, LONG, OTHER])
    assert (short, other) == (right[0], right[2])
    assert long[0] == [] and long[1] is not None
    assert f"expert {record[1]} of model.layers.{record[0]}." in long[1]
    disk.flip(*record)
    assert engine.embed([LONG, SHORT]) == [right[1], right[0]]
    engine.close()
    disk.close()


def test_requests_that_share_a_void_prefix_fail_with_it(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn
) -> None:
    """Scheduled in one step, the second takes the KV blocks of the prefix from the first, right or void."""
    record = only_in(healthy.routes[str(PREFIX)], healthy.routes[str(SECOND)], healthy.routes[str(OTHER)])
    engine = spawn()
    engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(disk.root.path))
    disk.flip(*record)
    first, other, second = engine.generate([FIRST, OTHER, SECOND])
    assert_failed(first, record)
    assert_failed(second, record)
    assert other == healthy.answers[str(OTHER)]
    disk.flip(*record)
    assert engine.generate([SECOND, FIRST]) == [healthy.answers[str(SECOND)], healthy.answers[str(FIRST)]]
    engine.close()


def test_damage_found_while_everything_is_loaded_is_rebuilt_by_the_next_start(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn
) -> None:
    disk.flip(2, 5)
    engine = spawn()
    with pytest.raises(EngineError, match=r"expert 5 of model\.layers\.2\..* checksum does not match"):
        engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="100%", store=str(disk.root.path))
    following = spawn()
    following.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="100%", store=str(disk.root.path))
    assert following.generate([LONG]) == [healthy.answers[str(LONG)]]
    following.close()


def test_a_damaged_store_on_a_read_only_disk_fails_requests_and_not_the_engine(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn
) -> None:
    record = only_in(healthy.routes[str(LONG)], healthy.routes[str(SHORT)])
    disk.flip(*record)
    disk.close()
    with read_only(disk.root.path):
        engine = spawn()
        engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(disk.root.path))
        short, long = engine.generate([SHORT, LONG])
        assert short == healthy.answers[str(SHORT)]
        assert_failed(long, record)
        assert engine.generate([SHORT]) == [healthy.answers[str(SHORT)]]
        engine.close()


def test_a_store_removed_under_a_running_engine(
    checkpoint: Checkpoint, healthy: Healthy, disk: DiskStore, spawn: Spawn
) -> None:
    engine = spawn()
    engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="10%", store=str(disk.root.path))
    shutil.rmtree(disk.root.path)
    for ids in (LONG, SHORT, FIRST):
        assert engine.generate([ids]) == [healthy.answers[str(ids)]]
    assert engine.stats()["loads"] > engine.stats()["slots"]
    engine.close()


def test_builders_killed_at_random_moments(checkpoint: Checkpoint, healthy: Healthy, spawn: Spawn, root: Path) -> None:
    whole = sum(file.stat().st_size for file in healthy.stores.glob("*/records.bin"))
    draw = random.Random(0)
    for stop_at in (0, draw.randrange(1, whole), whole - 1):
        engine = spawn()
        engine.begin("start", str(checkpoint.path), checkpoint.engine_args, {"cache": "25%", "store": str(root)})
        while written(root) < stop_at or not any(root.glob("*.building-*")):
            if engine.answered(0.001):
                break
        engine.process.kill()
        engine.process.join()
        assert [info.state for info in StoreRoot(root).ls()] in (["leftover"], ["complete"])
        for info in StoreRoot(root).ls():
            if info.state == "complete":
                shutil.rmtree(info.path)
    engine = spawn()
    engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(root))
    assert engine.generate([LONG, SHORT]) == [healthy.answers[str(LONG)], healthy.answers[str(SHORT)]]
    engine.close()
    (info,) = StoreRoot(root).ls()
    assert info.state == "complete"
    assert {path.suffix for path in root.iterdir()} == {"", ".lock", ".json"}, "a store, its lock, the file digests"
    (built,), (undisturbed,) = root.glob("*/records.bin"), healthy.stores.glob("*/records.bin")
    assert built.read_bytes() == undisturbed.read_bytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def written(root: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in root.glob("*.building-*/records.bin"))
    return 0


def test_a_disk_too_small_for_the_store(checkpoint: Checkpoint, healthy: Healthy, spawn: Spawn, root: Path) -> None:
    mount("-t", "tmpfs", "-o", "size=5M", "tmpfs", str(root))
    try:
        engine = spawn()
        with pytest.raises(EngineError, match=r"StoreError: cannot build the store at .*free") as caught:
            engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(root))
        assert str(root) in str(caught.value) and "VLLM_MOE_OFFLOAD_STORE_ROOT" in str(caught.value)
        assert StoreRoot(root).ls() == []
        mount("-o", "remount,size=50M", str(root))
        engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(root))
        assert engine.generate([LONG]) == [healthy.answers[str(LONG)]]
        engine.close()
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_a_root_that_cannot_be_written(checkpoint: Checkpoint, spawn: Spawn, root: Path) -> None:
    engine = spawn()
    with (
        read_only(root),
        pytest.raises(EngineError, match=r"StoreError: cannot build a store at .*: the file system is read-only"),
    ):
        engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(root))
    (root / "file").write_text("not a folder")
    with pytest.raises(EngineError, match=rf"StoreError: cannot .* at {root}/file.*: "):
        engine.start(checkpoint.path, checkpoint.engine_args, predictor="none", cache="25%", store=str(root / "file"))
    engine.close()


def test_of_two_engines_started_together_one_builds_and_the_other_waits(
    checkpoint: Checkpoint, healthy: Healthy, spawn: Spawn, root: Path
) -> None:
    builder, waiting = spawn(), spawn()
    start = ("start", str(checkpoint.path), checkpoint.engine_args, {"cache": "25%", "store": str(root)})
    builder.begin(*start)
    while not any(root.glob("*.building-*")):
        assert not builder.answered(0.001)
    os.kill(builder.process.pid, signal.SIGSTOP)
    waiting.begin(*start)
    while f"is being built by process {builder.process.pid}" not in waiting.log.read_text():
        assert not waiting.answered(0.01)
    os.kill(builder.process.pid, signal.SIGCONT)
    builder.end()
    waiting.end()
    assert "waiting for it" in waiting.log.read_text()
    assert "building store" in builder.log.read_text() and "building store" not in waiting.log.read_text()
    for engine in (builder, waiting):
        assert engine.generate([LONG, OTHER]) == [healthy.answers[str(LONG)], healthy.answers[str(OTHER)]]
        engine.close()
    assert [info.state for info in StoreRoot(root).ls()] == ["complete"]


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


class read_only:  # noqa: N801 - a context manager
    """Nothing below ``folder`` can be written, not even by root."""

    def __init__(self, folder: Path):
        self._folder = str(folder)

    def __enter__(self) -> None:
        mount("--bind", self._folder, self._folder)
        mount("-o", "remount,bind,ro", self._folder)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self._folder], check=True)
