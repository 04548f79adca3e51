"""A layer's window, stage and host records in memory of this process, as kernels see them, and the policy beside them.

Imported with TRITON_INTERPRET=1.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.device.virtual import VirtualDevice
from tests.windows.reference_kernels import choices_in_words
from vllm_moe_offload.windows.device_tables import DeviceTables, Ring, Window
from vllm_moe_offload.windows.launches import TritonKernels
from vllm_moe_offload.windows.tables import ABSENT, Outcomes, TooManyExpertsError, WindowTables

UNTOUCHED = 0xA5
RING = 3
MOST_IDS = 96
NOTHING = Outcomes(0, 0, 0)


class Part:
    """One component: records on the host, slots of the window and rows of the stage."""

    def __init__(self, rng: np.random.Generator, records: int, slots: int, nbytes: int):
        self.host, self.window, self.stage = (aligned(count, nbytes) for count in (records, slots, records))
        self.host[:] = rng.integers(0, 256, self.host.shape, dtype=np.uint8)
        self.window[:], self.stage[:] = UNTOUCHED, UNTOUCHED

    def row(self, target: NDArray[np.uint8]) -> list[int]:
        """What ``gather`` is told of it."""
        addresses = [array.ctypes.data for array in (target, self.host, self.window)]
        nbytes = self.host.shape[1]
        lane = next(lane for lane in (16, 8, 1) if all(number % lane == 0 for number in (*addresses, nbytes)))
        return [*addresses, nbytes, lane]


class WindowedLayer:
    """Runs kernels and policy side by side and compares all that they decide; ``number`` is its place in a model."""

    def __init__(
        self,
        experts: int,
        slots: int,
        parts: Sequence[int],
        *,
        base: int = 0,
        number: int = 1,
        record_of: NDArray[np.int32] | None = None,
        is_lent: bool = False,
    ):
        rng = np.random.default_rng(7)
        device = VirtualDevice(random.Random(0))
        windows = [Window(experts, slots, base, is_lent, record_of)] * (number + 1)
        self.tables = DeviceTables(device, windows)
        self.layer = self.tables.layers[number]
        self.ring = Ring(device, RING, len(windows), len(windows) * MOST_IDS)
        self.loaded = Ring(device, 1, len(windows), 1)
        owned = None if record_of is None else record_of >= 0
        self.record_of = np.arange(experts, dtype=np.int32) if record_of is None else record_of
        self.policy = WindowTables(experts, slots, owned)
        records = int(self.record_of.max()) + 1
        self.parts = [Part(rng, records, slots, nbytes) for nbytes in parts]
        self.into_window = torch.tensor([part.row(part.window) for part in self.parts])
        self.into_stage = torch.tensor([part.row(part.stage) for part in self.parts])
        self.misses = torch.full((1 + 3 * experts,), -9, dtype=torch.int32)
        self.real_rows = torch.zeros(1, dtype=torch.int32)
        self.kernels = TritonKernels(experts, programs=3)

    def serve(self, ids: NDArray[np.integer], step: int, real: int, dtype: torch.dtype = torch.int32) -> None:
        """One narrow step through both."""
        given = torch.from_numpy(ids.astype(np.int32)).to(dtype)
        self.real_rows[0], self.ring.step[0] = real, step
        out = torch.full_like(given, 77)
        weights = weights_of(ids)
        self.kernels.manage(self.layer, given, weights, self.real_rows, out, self.misses, self.ring)
        self.kernels.gather(self.layer, self.into_window, self.misses, self.ring)
        overflow = 0
        try:
            (slots, misses), outcomes = self.policy.serve_and_count(ids, step, real)
        except TooManyExpertsError:
            overflow, misses, outcomes = 1, np.empty((0, 2), np.int32), NOTHING
            slots = np.where(ids >= 0, self.policy.slot_of[np.maximum(ids, 0)], ABSENT)
            slots[real:] = slots[0]
        self._compare(ids, slots, misses, real, out.numpy())
        used = np.unique(ids[:real][ids[:real] >= 0])
        used = used[self.record_of[used] >= 0]
        loaded = len(misses) * sum(part.host.shape[1] for part in self.parts)
        self.compare_ring(
            ids, weights, step, [real * ids.shape[1], len(used), len(misses), overflow, loaded, *outcomes]
        )

    def serve_wide(self, ids: NDArray[np.integer], step: int, real: int) -> None:
        """One step through the stage; what the window holds comes from there unless it is lent."""
        self.real_rows[0], self.ring.step[0] = real, step
        for part in self.parts:
            part.stage[:] = UNTOUCHED
            part.window ^= 0xFF  # to tell what comes from there
        weights = weights_of(ids)
        self.kernels.stage(self.layer, torch.from_numpy(ids), weights, self.real_rows, self.misses, self.ring)
        self.kernels.gather(self.layer, self.into_stage, self.misses, self.ring)
        used = np.unique(ids[:real][ids[:real] >= 0])
        local = self.record_of[used]
        used, local = used[local >= 0], local[local >= 0]
        count = int(self.misses[0])
        listed = self.misses[1 : 1 + 3 * count].numpy().reshape(count, 3)
        resident = np.full(len(used), -1) if self.layer.window.is_lent else self.policy.slot_of[used]
        assert listed.tolist() == np.stack([local, local, resident], axis=1).tolist()
        for part in self.parts:
            from_window = (resident >= 0)[:, None]
            assert (part.stage[local] == np.where(from_window, part.window[resident], part.host[local])).all()
            part.window ^= 0xFF
            assert (np.delete(part.stage, local, axis=0) == UNTOUCHED).all()
        loaded = len(used) * sum(part.host.shape[1] for part in self.parts)
        self.compare_ring(ids, weights, step, [real * ids.shape[1], len(used), len(used), 0, loaded, *NOTHING])

    def speculate(self, scores: NDArray[np.float32], step: int) -> int:
        """Load an absent expert with a score above 0 in two halves; how many that were."""
        self.ring.step[0] = step
        misses, given = torch.full((4,), -9, dtype=torch.int32), torch.tensor([1, step])
        self.kernels.select_speculative(self.layer, given, torch.from_numpy(scores[None]), 0.0, misses, self.ring)
        for half in range(2):
            self.kernels.gather(self.layer, self.into_window, misses, self.loaded, half, 2)
        speculated = self.policy.speculate(scores, step, 0.0)
        self._compare_tables()
        return len(speculated)

    def forget(self) -> None:
        """The window has been overwritten."""
        self.kernels.forget(self.tables)
        self.policy.forget()
        for part in self.parts:
            part.window[:] = UNTOUCHED

    def _compare(
        self,
        ids: NDArray[np.integer],
        slots: NDArray[np.int32],
        misses: NDArray[np.int32],
        real: int,
        out: NDArray[np.integer],
    ) -> None:
        window = self.layer.window
        if window.record_of is None:
            expected = np.where(slots >= 0, slots + window.base, ABSENT)
        else:
            expected = np.where(np.arange(len(ids))[:, None] < real, ids, ids[0])
        assert (out.astype(np.int32) == expected).all()
        count = int(self.misses[0])
        listed = self.misses[1 : 1 + 3 * count].numpy().reshape(count, 3)
        assert listed.tolist() == [[self.record_of[expert], slot, -1] for expert, slot in misses]
        self._compare_tables()

    def _compare_tables(self) -> None:
        layer, policy = self.layer, self.policy
        row_of = np.where(policy.slot_of >= 0, policy.slot_of + layer.window.base, ABSENT)
        tables = layer.row_of, layer.expert_of, layer.heat, layer.epoch, layer.mark
        decisions = row_of, policy.expert_of, policy.heat, policy.epoch, policy.mark
        for table, decided in zip(tables, decisions, strict=True):
            assert (table.numpy() == decided).all()
        occupied = np.flatnonzero(policy.expert_of >= 0)
        for part in self.parts:
            assert (part.window[occupied] == part.host[self.record_of[policy.expert_of[occupied]]]).all()
            assert (np.delete(part.window, occupied, axis=0) == UNTOUCHED).all()

    def compare_ring(self, ids: NDArray[np.integer], weights: torch.Tensor, step: int, info: list[int]) -> None:
        entry, number, count = step % len(self.ring.choices), self.layer.number, info[0]
        assert self.ring.notes[entry, number].tolist() == [step, *info]
        kept = self.ring.choices[entry, number * count : (number + 1) * count]
        real = count // ids.shape[1]
        assert kept.tolist() == choices_in_words(ids[:real], weights.numpy()[:real]).tolist()


def weights_of(ids: NDArray[np.integer]) -> torch.Tensor:
    """Any that a router may give: also what no float16 holds, and what is no number."""
    weights = np.random.default_rng(ids.size).lognormal(0, 3, ids.shape).astype(np.float32)
    weights.flat[::7] = [np.nan, np.inf, 1e9, -0.5, 1e-9, 0.0, 1.0][ids.size % 7]
    return torch.from_numpy(weights)


def aligned(count: int, nbytes: int) -> NDArray[np.uint8]:
    """``[count, nbytes]`` from a multiple of 256 on."""
    whole = np.empty(count * nbytes + 256, np.uint8)
    return whole[-whole.ctypes.data % 256 :][: count * nbytes].reshape(count, nbytes)
