"""reads.py on a real store: every way of reading is measured, and a damaged record is an error, not a rate."""

from pathlib import Path

import pytest
from engines import Engine, Variant
from reads import measure

from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.store.reader import Store


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory, tiny_moe: Path) -> Path:
    stores = tmp_path_factory.mktemp("stores")
    arguments = {"model": str(tiny_moe), "enforce_eager": True, "max_model_len": 256}
    engine = Engine.start(Variant("25%", {"cache": "25%", "store": str(stores)}, arguments))
    assert engine.loaded["model_seconds"] <= engine.loaded["load_seconds"]
    engine.stop()
    (manifest,) = stores.glob("*/manifest.json")
    return manifest.parent


def test_disk_and_plugin_are_measured_round_by_round(store_folder: Path) -> None:
    rates = measure(Store.open(store_folder), batches=[1, 8], rounds=2, count=32, seed=0)
    assert list(rates) == ["disk, 1 in flight", "plugin, 1 at a time", "disk, 5 in flight", "plugin, 8 at a time"]
    assert all(len(rate) == 2 and min(rate) > 0 for rate in rates.values())


def test_a_damaged_record_is_an_error(store_folder: Path) -> None:
    with (store_folder / "records.bin").open("r+b") as records:
        records.write(b"not the first record")
    with pytest.raises(LoadError, match="checksum"):
        measure(Store.open(store_folder), batches=[1], rounds=1, count=32, seed=0)
