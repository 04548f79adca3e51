"""The measurement of ``gather`` in Triton's interpreter: what it measures has arrived, and wrong bytes are found."""

import numpy as np
import pytest

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device import DeviceError
from vllm_moe_offload.windows import gather_rate


def registered(device: VirtualDevice) -> np.ndarray:
    memory = np.random.default_rng(0).integers(0, 256, 3 * 4096, np.uint8)
    device.register(memory)
    return memory


def test_every_grid_loads_all_records() -> None:
    device = VirtualDevice(main_is_host=True)
    rates = gather_rate.gather_rates(device, registered(device), 4096, programs=(1, 3))
    assert set(rates) == {1, 3} and all(rate > 0 for rate in rates.values())


def test_wrong_bytes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VirtualDevice(main_is_host=True)
    memory = registered(device)
    there = device.address(memory)
    monkeypatch.setattr(device, "address", lambda _: there + 16)
    with pytest.raises(DeviceError, match="something else"):
        gather_rate.gather_rates(device, memory[:8192], 4096, programs=(1,))
