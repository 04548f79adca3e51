"""reads.py on a real store: every way of reading is measured, and a damaged record is an error, not a rate."""

from pathlib import Path

import pytest
from reads import measure

from tests.runtime.record_stores import build_store, layout
from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.store.reader import Store


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    return build_store(tmp_path, [(layout(49152, 24576), 64)] * 8).store.path


def test_disk_and_plugin_are_measured_round_by_round(store_folder: Path) -> None:
    rates = measure(Store.open(store_folder), batches=[1, 8], rounds=2, count=32, seed=0)
    assert list(rates) == ["disk, 1 in flight", "plugin, 1 at a time", "disk, 5 in flight", "plugin, 8 at a time"]
    assert all(len(rate) == 2 and min(rate) > 0 for rate in rates.values())


def test_a_damaged_record_is_an_error(store_folder: Path) -> None:
    with (store_folder / "records.bin").open("r+b") as records:
        records.write(b"not the first record")
    with pytest.raises(LoadError, match="checksum"):
        measure(Store.open(store_folder), batches=[1], rounds=1, count=32, seed=0)
