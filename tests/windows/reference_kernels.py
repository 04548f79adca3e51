"""``WindowTables`` as work of a virtual device, in place of kernels."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from tests.device.virtual import Memory, VirtualDevice, VirtualStream
from vllm_moe_offload.predict import kernels
from vllm_moe_offload.trace.recorder import routing_shares
from vllm_moe_offload.windows.device_tables import DeviceTables, Kernels, LayerTables, Ring
from vllm_moe_offload.windows.speculative_loads import Head, SpeculativeKernels
from vllm_moe_offload.windows.tables import ABSENT, Outcomes, WindowTables

NO_OUTCOMES = Outcomes(0, 0, 0)


class ReferenceKernels(Kernels):
    """Enqueues on ``main`` what ``TritonKernels`` would launch."""

    def __init__(self, device: VirtualDevice):
        self.device = device
        self.stream = device.main

    def manage(
        self,
        layer: LayerTables,
        ids: torch.Tensor,
        weights: torch.Tensor,
        real_rows: torch.Tensor,
        out: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
        keeps: bool = True,
    ) -> None:
        window = layer.window

        def compute(values: list[Memory]) -> None:
            given, real, tables, header = (np.asarray(value) for value in values[:4])
            policy = policy_of(layer, tables)
            (slots, missing), outcomes = policy.serve_and_count(given, int(header[0]), int(real[0]))
            rows = np.where(slots >= 0, slots + window.base, ABSENT)
            if window.record_of is not None:  # the kernel looks experts up by itself
                rows = np.where((np.arange(len(given)) < int(real[0]))[:, None], given, given[0])
            out.copy_(torch.from_numpy(rows))
            missing[:, 0] = tables[3][missing[:, 0]]
            write_misses(misses, missing, np.full(len(missing), ABSENT))
            write_residents(layer, policy, tables)
            used = len(used_of(given, real))
            write_ring(ring, layer, given, values[4], int(real[0]), used, len(missing), outcomes, keeps)

        def writes() -> Sequence[Memory]:
            return [layer.tables, out, misses, *entry_of(ring, layer, ids, real_rows, keeps)]

        reads = [ids, real_rows, layer.tables, ring.header, weights]
        self.device.kernel(self.device.main, lambda: reads, compute, writes, "manage")

    def stage(
        self,
        layer: LayerTables,
        ids: torch.Tensor,
        weights: torch.Tensor,
        real_rows: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        def compute(values: list[Memory]) -> None:
            given, real, tables = (np.asarray(value) for value in values[:3])
            used = used_of(given, real)
            used = used[tables[3][used] >= 0]
            records = tables[3][used]
            rows = tables[0][used]
            slots = np.where((rows >= 0) & (not layer.window.is_lent), rows - layer.window.base, ABSENT)
            write_misses(misses, np.stack([records, records], axis=1), slots)
            write_ring(ring, layer, given, values[4], int(real[0]), len(used), len(used))

        def writes() -> Sequence[Memory]:
            return [misses, *entry_of(ring, layer, ids, real_rows)]

        reads = [ids, real_rows, layer.tables, ring.header, weights]
        self.device.kernel(self.device.main, lambda: reads, compute, writes, "stage")

    def gather(
        self,
        layer: LayerTables,
        components: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        def moves() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
            listed = misses[1 : 1 + 3 * int(misses[0])].view(-1, 3).tolist()
            return [
                (
                    at(target + row * nbytes, nbytes)[cut],
                    at(window + slot * nbytes if slot >= 0 else host + record * nbytes, nbytes)[cut],
                )
                for record, row, slot in listed
                for target, host, window, nbytes, _ in components.tolist()
                for cut in [slice(nbytes * part // parts, nbytes * (part + 1) // parts)]
            ]

        def copied() -> torch.Tensor:
            return ring.notes[int(ring.step[0]) % len(ring.notes), layer.number, 5:6]

        def compute(values: list[Memory]) -> None:
            _, _, _, before, *sources = values
            targets = [target for target, _ in moves()]
            for target, source in zip(targets, sources, strict=True):
                target[:] = np.asarray(source)
            copied().copy_(before + sum(target.nbytes for target in targets))

        def reads() -> Sequence[Memory]:
            return [misses, components, ring.header, copied(), *(source for _, source in moves())]

        def writes() -> Sequence[Memory]:
            return [copied(), *(target for target, _ in moves())]

        self.device.kernel(self.stream, reads, compute, writes, "gather")

    def note(
        self, layer: LayerTables, ids: torch.Tensor, weights: torch.Tensor, real_rows: torch.Tensor, ring: Ring
    ) -> None:
        def compute(values: list[Memory]) -> None:
            given, real = (np.asarray(value) for value in values[:2])
            write_ring(ring, layer, given, values[2], int(real[0]), 0, 0)

        def writes() -> Sequence[Memory]:
            return entry_of(ring, layer, ids, real_rows)

        reads = [ids, real_rows, weights, ring.header]
        self.device.kernel(self.device.main, lambda: reads, compute, writes, "note")

    def forget(self, tables: DeviceTables) -> None:
        overwritten = [
            row for layer in tables.layers if layer.window.is_lent for row in (layer.tables[0], layer.tables[4])
        ]
        self._fill(overwritten, ABSENT)

    def reset(self, tables: DeviceTables) -> None:
        self._fill([row for layer in tables.layers for row in (layer.tables[0], layer.tables[4])], ABSENT)
        self._fill([row for layer in tables.layers for row in (layer.tables[1], layer.tables[2], layer.tables[5])], 0)

    def advance(self, ring: Ring) -> None:
        def compute(values: list[Memory]) -> None:
            ring.step.copy_(values[0] + 1)

        self.device.kernel(self.device.main, lambda: [ring.step], compute, lambda: [ring.step], "advance")

    def _fill(self, rows: list[torch.Tensor], value: int) -> None:
        def compute(_: list[Memory]) -> None:
            for row in rows:
                row.fill_(value)

        self.device.kernel(self.device.main, lambda: [], compute, lambda: rows, "fill")


class ReferenceSpeculativeKernels(ReferenceKernels, SpeculativeKernels):
    """The predictor's arithmetic, and ``WindowTables.speculate``."""

    @contextmanager
    def on(self, stream: VirtualStream) -> Iterator[None]:
        self.stream = stream
        yield
        self.stream = self.device.main

    def observe(
        self,
        head: Head,
        given: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        ring: Ring,
    ) -> None:
        def compute(values: list[Memory]) -> None:
            chosen, shares, state, *_ = values
            after.copy_(state)
            added = head.added.numpy().copy()
            shares = routing_shares(shares.float().numpy())
            kernels.add_map(*kernels.as_map(chosen.numpy(), shares), added, after.numpy())

        reads = [ids, weights, before, given, ring.header, head.added]
        self.device.kernel(self.stream, lambda: reads, compute, lambda: [after], "observe")

    def evaluate(
        self,
        head: Head,
        given: torch.Tensor,
        state: torch.Tensor,
        known: torch.Tensor,
        scores: torch.Tensor,
        ring: Ring,
    ) -> None:
        def compute(values: list[Memory]) -> None:
            now, before, inner, outer, bias, *_ = values
            scores.copy_(torch.relu(now @ inner.T + before) @ outer.T + bias)

        reads = [state, known, head.inner, head.outer, head.bias, given, ring.header]
        self.device.kernel(self.stream, lambda: reads, compute, lambda: [scores], "evaluate")

    def select_speculative(
        self,
        layer: LayerTables,
        given: torch.Tensor,
        scores: torch.Tensor,
        threshold: float,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        def compute(values: list[Memory]) -> None:
            found, (rows, step), tables, header = (np.asarray(value) for value in values)
            policy = policy_of(layer, tables)
            best = found[: rows if step == header[0] else 0].max(axis=0, initial=-np.inf)
            speculated = policy.speculate(best, int(header[0]), threshold)
            write_misses(
                misses, np.column_stack([tables[3][speculated[:, 0]], speculated[:, 1]]), np.full(len(speculated), -1)
            )
            write_residents(layer, policy, tables)
            self.speculated += len(speculated)

        reads = [scores, given, layer.tables, ring.header]
        self.device.kernel(
            self.stream, lambda: reads, compute, lambda: [layer.tables, misses], "select speculative load"
        )

    speculated = 0


def policy_of(layer: LayerTables, tables: NDArray[np.int32]) -> WindowTables:
    """The policy in the state that the device's tables say."""
    window = layer.window
    policy = WindowTables(window.experts, window.slots, tables[3, : window.experts] >= 0)
    rows = tables[0, : window.experts]
    policy.slot_of[:] = np.where(rows >= 0, rows - window.base, ABSENT)
    policy.heat[:], policy.epoch[:] = tables[1, : window.experts], tables[2, : window.experts]
    policy.expert_of[:] = tables[4, : window.slots]
    policy.mark[:] = tables[5, : window.experts]
    return policy


def write_residents(layer: LayerTables, policy: WindowTables, tables: NDArray[np.int32]) -> None:
    """The tables as they were, but for what the policy has decided."""
    window = layer.window
    tables[0, : window.experts] = np.where(policy.slot_of >= 0, policy.slot_of + window.base, ABSENT)
    tables[1, : window.experts], tables[2, : window.experts] = policy.heat, policy.epoch
    tables[4, : window.slots], tables[5, : window.experts] = policy.expert_of, policy.mark
    layer.tables.copy_(torch.from_numpy(tables))


def used_of(ids: NDArray[np.integer], real_rows: NDArray[np.int32]) -> NDArray[np.integer]:
    used = np.unique(ids[: real_rows[0]])
    return used[used >= 0]


def write_misses(misses: torch.Tensor, listed: NDArray[np.int32], slots: NDArray[np.integer]) -> None:
    misses.fill_(-7)
    misses[0] = len(listed)
    misses[1 : 1 + 3 * len(listed)] = torch.from_numpy(np.column_stack([listed, slots]).astype(np.int32).reshape(-1))


def entry_of(
    ring: Ring, layer: LayerTables, ids: torch.Tensor, real_rows: torch.Tensor, keeps: bool = True
) -> list[torch.Tensor]:
    """The layer's choices in the step, if it keeps them, and its note."""
    entry = int(ring.step[0]) % len(ring.choices)
    count = min(int(real_rows[0]), len(ids)) * ids.shape[1]
    first = layer.number * count
    choices = [ring.choices[entry, first : first + count]] if keeps else []
    return [*choices, ring.notes[entry, layer.number]]


def write_ring(
    ring: Ring,
    layer: LayerTables,
    ids: NDArray[np.integer],
    weights: Memory,
    real: int,
    used: int,
    misses: int,
    outcomes: Outcomes = NO_OUTCOMES,
    keeps: bool = True,
) -> None:
    *kept, note = entry_of(ring, layer, torch.from_numpy(ids), torch.tensor([real]), keeps)
    words = choices_in_words(ids[:real], np.asarray(weights)[:real])
    for place in kept:
        place.copy_(torch.from_numpy(words))
    note.copy_(torch.tensor([int(ring.step[0]), min(real, len(ids)) * ids.shape[1], used, misses, 0, 0, *outcomes]))


def choices_in_words(ids: NDArray[np.integer], weights: NDArray[np.floating]) -> NDArray[np.int32]:
    """As the ring holds them: ids in the lower halves, weights in the upper ones."""
    halves = np.stack([ids.astype(np.int16), weights.astype(np.float16).view(np.int16)], axis=-1)
    return halves.reshape(-1).view(np.int32)


def at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
