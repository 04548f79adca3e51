"""Slots in the memory of a device, whose copies run late: the tokens and logprobs of unmodified vLLM all the same.

The device is a virtual one behind the host's memory; its kernels are those of vLLM for the CPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.e2e.engine_server import virtual_device
from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS, prompts
from tests.e2e.live_engine import EngineError, LiveEngine
from vllm_moe_offload.store import Store

ENGINE = {"enforce_eager": True, "dtype": "bfloat16"}
EXPERTS = 8 * 64
RECORD_BYTES = 3 * 192 * 64 * 2


@pytest.fixture(scope="module")
def expected(tiny_moe: Path, plain: EngineServer) -> list[Any]:
    return plain.run(tiny_moe, ENGINE, ROUNDS)["rounds"]


def stats_of(server: EngineServer, model: Path, expected: list[Any], order: int, **settings: Any) -> dict[str, Any]:
    """Of an engine that has given the tokens expected."""
    offload = {"predictor": "none", "daemon": "off"} | settings
    engine = ENGINE | {"additional_config": {"moe_offload": offload}}
    answer = server.run(model, engine, ROUNDS, every_step="predictor" in settings, order=order)
    assert answer["rounds"] == expected
    (stats,) = answer["stats"]
    assert stats["layers"] == 8 and stats["failed_loads"] == stats["waves"] == 0
    return stats


def test_the_least_slots_over_host_memory_and_a_disk(
    tiny_moe: Path, expected: list[Any], offloaded: EngineServer
) -> None:
    stats = stats_of(offloaded, tiny_moe, expected, order=1, cache="12.6%", host_cache="40%")
    assert 32 <= stats["slots"] <= EXPERTS // 8
    assert 0 < stats["host_hits"] < stats["misses"] and stats["loads"] > EXPERTS // 2
    assert stats["copied_bytes"] >= stats["misses"] * RECORD_BYTES


def test_a_quarter_with_copies_ahead(tiny_moe: Path, expected: list[Any], offloaded: EngineServer) -> None:
    stats = stats_of(offloaded, tiny_moe, expected, order=2, cache="25%", predictor="frequency")
    assert stats["slots"] == EXPERTS // 4
    assert stats["prefetches"] > 0 and stats["prefetch_useful"] + stats["prefetch_late"] > 0
    assert stats["loads"] <= EXPERTS, "host memory has room for every expert"


def test_half(tiny_moe: Path, expected: list[Any], offloaded: EngineServer) -> None:
    stats = stats_of(offloaded, tiny_moe, expected, order=3, cache="50%")
    assert stats["slots"] == EXPERTS // 2
    assert stats["hits"] > stats["misses"] > 0 and stats["streamed"] > 0


def test_everything(tiny_moe: Path, expected: list[Any], offloaded: EngineServer) -> None:
    """vLLM's own path, over slots of the device."""
    stats = stats_of(offloaded, tiny_moe, expected, order=4, cache="100%")
    assert stats["slots"] == stats["loads"] == EXPERTS and stats["hits"] == stats["misses"] == 0
    assert stats["copied_bytes"] == stats["expert_bytes"] == EXPERTS * RECORD_BYTES


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LiveEngine]:
    engine = LiveEngine(tmp_path / "engine.log")
    yield engine
    engine.process.kill()
    engine.process.join()


def test_faults(tiny_moe: Path, engine: LiveEngine, tmp_path: Path) -> None:
    """Too little device memory is an error of the start, an unreadable record of requests, a refused copy the end."""
    settings = {"cache": "25%", "predictor": "none", "daemon": "off", "store": str(tmp_path / "stores")}
    engine.run(device_of_a_mebibyte)
    with pytest.raises(EngineError, match=r"ConfigError: cache = '25%' takes .* of device memory"):
        engine.start(tiny_moe, ENGINE, **settings)
    engine.run(device_of_any_size)
    engine.start(tiny_moe, ENGINE, **settings)
    assert engine.stats()["copied_bytes"] == 0, "a warm-up run copies experts"
    taken, least = engine.call(device_slots)
    assert EXPERTS // 4 * RECORD_BYTES <= taken < EXPERTS * RECORD_BYTES
    assert 32 * RECORD_BYTES <= least < taken, "what is named where the KV cache finds no room"
    (store,) = (path for path in (tmp_path / "stores").iterdir() if (path / "manifest.json").exists())
    records = [Store.open(store).offset(3, expert) for expert in range(64)]
    with (store / "records.bin").open("r+b") as file:
        flip(file, records)
        (answer,) = engine.generate(prompts(1, seed=1))
        assert answer.finish_reason == "error" and "could not be read" in str(answer.stop_reason)
        flip(file, records)
    (answer,) = engine.generate(prompts(1, seed=1))
    assert answer.finish_reason == "length" and len(answer.tokens) == 4
    engine.call(refuse_copies)
    with pytest.raises(EngineError, match="the virtual driver was told to refuse"):
        engine.generate(prompts(1, seed=9))


def device_of_a_mebibyte() -> None:
    virtual_device(capacity=1 << 20).__enter__()


def device_of_any_size() -> None:
    virtual_device(order=1).__enter__()


def flip(file: BinaryIO, offsets: list[int]) -> None:
    """Turn a bit around at each offset; a second time, back."""
    for offset in offsets:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 16]))
    file.flush()


def refuse_copies(worker: Any) -> None:
    runtime = worker.model_runner.get_model().moe_offload.runtime
    next(iter(runtime.layers.values())).pool.memory.device.faults.copies = 0


def device_slots(worker: Any) -> tuple[int, int]:
    return worker.moe_offload.device_slots
