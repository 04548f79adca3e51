"""The kernels of ``kernels.py`` and ``speculative_kernels.py`` launched on torch's current stream."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from ..device.base import Stream
from . import kernels, speculative_kernels
from .device_tables import DeviceTables, LayerTables, Ring
from .speculative_loads import Head
from .tables import ABSENT

COMPILE_OPTIONS = {} if torch.version.hip else {"maxnreg": 128}
"""Without a bound, NVIDIA's assembler spills a register to have more programs at a time than there are."""

_PROGRAMS = 64
"""Of one gather: enough for the link between host and device, and few to start where nothing is missing."""
_COPY_WORDS = 1024
"""Copied by one program at a time."""
_NOTE_IDS = 1024
_HEAD_UNITS = 16
_HEAD_LANES_PER_WARP = 32
_IDS_AT_ONCE = 8
_LANES_PER_WARP = 128


class TritonKernels:
    """``speculative_loads.SpeculativeKernels`` of one engine; nothing here allocates or looks at results.

    Args:
        most_experts: of any layer.
        programs: of one gather.
    """

    def __init__(self, most_experts: int, programs: int = _PROGRAMS):
        self._programs = programs
        self._lanes = max(16, triton.next_power_of_2(most_experts))
        self._warps = min(max(1, self._lanes // _LANES_PER_WARP), 8)

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
        window, tables = layer.window, layer.tables
        kernels.manage[(1,)](
            *(ids, weights, ids.numel(), ids.shape[1], real_rows, tables, tables.shape[1]),
            *(window.base, window.experts, window.slots, int(window.record_of is not None), int(keeps)),
            *(out, misses, ring.header, layer.number),
            P=self._lanes,
            CHUNK=_IDS_AT_ONCE,
            num_warps=self._warps,
            **COMPILE_OPTIONS,
        )

    def stage(
        self,
        layer: LayerTables,
        ids: torch.Tensor,
        weights: torch.Tensor,
        real_rows: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        window, tables = layer.window, layer.tables
        kernels.stage[(1,)](
            *(ids, weights, ids.numel(), ids.shape[1], real_rows, tables, tables.shape[1]),
            *(window.base, window.experts, int(window.is_lent), misses, ring.header, layer.number),
            P=self._lanes,
            CHUNK=_IDS_AT_ONCE,
            num_warps=self._warps,
            **COMPILE_OPTIONS,
        )

    def gather(
        self,
        layer: LayerTables,
        components: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        kernels.gather[(self._programs,)](
            *(misses, components, len(components), self._programs, part, parts, ring.header, layer.number),
            BLOCK=_COPY_WORDS,
            **COMPILE_OPTIONS,
        )

    def note(
        self, layer: LayerTables, ids: torch.Tensor, weights: torch.Tensor, real_rows: torch.Tensor, ring: Ring
    ) -> None:
        kernels.note[(triton.cdiv(ids.numel(), _NOTE_IDS),)](
            *(ids, weights, ids.numel(), ids.shape[1], real_rows, ring.header, layer.number),
            CHUNK=_NOTE_IDS,
            **COMPILE_OPTIONS,
        )

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """A device whose kernels run on this processor has streams without one of torch."""
        torch_stream = getattr(stream, "stream", None)
        return nullcontext() if torch_stream is None else torch.cuda.stream(torch_stream)

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
        rows, width = before.shape
        speculative_kernels.observe[(rows,)](
            *(given, ids, weights, ids.shape[1], head.added, before, after, width, ring.header),
            S=triton.next_power_of_2(width),
            **COMPILE_OPTIONS,
        )

    def evaluate(
        self,
        head: Head,
        given: torch.Tensor,
        state: torch.Tensor,
        known: torch.Tensor,
        scores: torch.Tensor,
        ring: Ring,
    ) -> None:
        rows, width = state.shape
        speculative_kernels.evaluate[(rows,)](
            *(given, state, known, head.inner, head.outer, head.bias, scores),
            *(scores.shape[1], width, known.shape[1], ring.header),
            P=self._lanes,
            BLOCK=_HEAD_UNITS,
            num_warps=min(max(4, self._lanes // _HEAD_LANES_PER_WARP), 16),
            **COMPILE_OPTIONS,
        )

    def select_speculative(
        self,
        layer: LayerTables,
        given: torch.Tensor,
        scores: torch.Tensor,
        threshold: float,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        window, tables = layer.window, layer.tables
        speculative_kernels.select_speculative[(1,)](
            *(given, scores, len(scores), threshold, tables, tables.shape[1]),
            *(window.base, window.experts, window.slots, misses, ring.header),
            P=self._lanes,
            num_warps=self._warps,
            **COMPILE_OPTIONS,
        )

    def forget(self, tables: DeviceTables) -> None:
        tables.tables[:, 0].masked_fill_(tables.lent, ABSENT)
        tables.tables[:, 4].masked_fill_(tables.lent, ABSENT)

    def reset(self, tables: DeviceTables) -> None:
        tables.tables[:, 0].fill_(ABSENT)
        tables.tables[:, 1:3].zero_()
        tables.tables[:, 4].fill_(ABSENT)
        tables.tables[:, 5].zero_()

    def advance(self, ring: Ring) -> None:
        ring.step.add_(1)
