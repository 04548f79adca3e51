"""Rates of a device, with one whose work runs late: everything measured has been waited for."""

import numpy as np
import pytest
import torch

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device import RegistrationError
from vllm_moe_offload.device.rates import Overlap, copy_rates, overlap, registration_seconds


def registered(device: VirtualDevice, nbytes: int) -> np.ndarray:
    memory = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    assert registration_seconds(device, memory) >= 0
    return memory


@pytest.mark.parametrize("seed", range(5))
def test_copies_have_arrived_when_their_rate_is_known(seed: int) -> None:
    device = VirtualDevice(seed)
    memory = registered(device, (2 << 20) + 100)
    rates = copy_rates(device, memory)
    assert set(rates.alone) == set(rates.together) == {256 << 10, 1 << 20}
    assert all(rate > 0 for rate in (*rates.alone.values(), *rates.together.values()))
    assert device.pending == 0
    (target,) = (kept for kept in device._kept if kept.nbytes == memory.nbytes)
    assert torch.equal(target[: 2 << 20], torch.from_numpy(memory)[: 2 << 20])


def test_overlap_waits_for_copies_and_kernels() -> None:
    device = VirtualDevice(0, main_is_host=True)
    found = overlap(device, registered(device, 1 << 20), width=16)
    assert min(found) > 0 and device.pending == 0


@pytest.mark.parametrize(("times", "hidden"), [((2.0, 3.0, 3.0), 1.0), ((2.0, 3.0, 5.0), 0.0), ((2.0, 2.0, 3.0), 0.5)])
def test_what_is_hidden_is_a_share_of_the_shorter(times: tuple[float, ...], hidden: float) -> None:
    assert Overlap(*times).hidden == pytest.approx(hidden)


def test_refused_registration_is_raised() -> None:
    device = VirtualDevice()
    device.faults.registrations = 0
    with pytest.raises(RegistrationError):
        registered(device, 4096)
