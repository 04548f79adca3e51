"""Guesses inside a step: while a layer computes, the device predicts a layer ahead and loads what that lacks.

The learned heads (``predict/heads.py``) are evaluated where routing is, on a stream of their own. At most one record
goes straight into the window of the layer ahead; streams keep it apart from the layer's own kernels. A guess may be
wrong, never harmful: it changes what is loaded, not what is computed.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device, Event, Stream
from .device_tables import DeviceTables, Kernels, LayerTables, Ring, zeros
from .step_log import AHEAD

if TYPE_CHECKING:
    from ..predict.heads import HeadWeights

MOST_ROWS = 4
"""Of a step with guesses: more rows use so many experts that one more does not count."""
_RECORDS = 1 + 3
"""Numbers of a list of one miss."""


class Head(NamedTuple):
    """One layer's weights on the device, float32; ``guess_kernels`` has the shapes."""

    added: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor
    bias: torch.Tensor


class GuessKernels(Kernels, Protocol):
    """Work of guesses."""

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """What is enqueued meanwhile goes to ``stream``."""

    def observe(
        self, head: Head, ids: torch.Tensor, weights: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        """``after`` = ``before`` and what a layer's choices add: ``[rows, width]`` each."""

    def evaluate(self, head: Head, state: torch.Tensor, known: torch.Tensor, scores: torch.Tensor) -> None:
        """``scores`` ``[rows, experts]``: the logits of each expert's use."""

    def select_guess(
        self,
        layer: LayerTables,
        scores: torch.Tensor,
        n_rows: torch.Tensor,
        threshold: float,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        """``WindowTables.guess`` by the best of the first ``n_rows`` rows."""


class Guesses:
    """Of one model's layers.

    Args:
        into_window: by layer the table by which ``gather`` finds its components.
        ring: that of the steps.
        distance: layers that a guess is ahead.
        threshold: probability above which an expert is loaded.
    """

    def __init__(
        self,
        device: Device,
        weights: "HeadWeights",
        tables: DeviceTables,
        into_window: Sequence[torch.Tensor],
        kernels: GuessKernels,
        ring: Ring,
        *,
        distance: int,
        threshold: float,
    ):
        assert distance > 0 and 0 < threshold < 1
        self._device, self._tables, self._into_window, self._kernels = device, tables, into_window, kernels
        self._ring, self._distance = ring, distance
        self._threshold = math.log(threshold / (1 - threshold))
        layers = len(tables.layers)
        self._heads = [
            Head(*(_uploaded(device, part[layer]) for part in _parts_of(weights))) for layer in range(layers)
        ]
        hidden, width = weights.heads[0].shape
        self._states = zeros(device, (layers + 1, MOST_ROWS, width), torch.float32)
        """Before each layer; the one of the first is given."""
        self._known = zeros(device, (layers, MOST_ROWS, hidden), torch.float32)
        self._n_rows = zeros(device, (1,), torch.int32)
        self._given = (self._n_rows, self._states[0], self._known)
        self._staged = [[device.allocate_pinned(part.nbytes) for part in self._given] for _ in range(AHEAD + 1)]
        self._copied: list[Event | None] = [None] * len(self._staged)
        self._begun = 0
        self._scores = zeros(device, (MOST_ROWS, len(weights.output_bias[0])), torch.float32)
        self._misses = zeros(device, (_RECORDS,), torch.int32)
        self._loaded = Ring(device, 1, layers, 1)
        """Where the bytes of guesses are counted."""
        self._stream = device.stream("guesses")
        self._under_way: dict[int, Event] = {}
        """By layer, behind the guess that main has not waited for."""

    def begin(self, state: NDArray[np.float32], known: NDArray[np.float32]) -> None:
        """Before a step, outside of graphs: what is known of its rows. Without a call that of an earlier step counts.

        Args:
            state: ``[rows, width]`` before the first layer; no rows, no guesses.
            known: ``[layers, rows, hidden]``, as ``HeadWeights.hidden_before``.
        """
        rows = len(state)
        assert rows <= MOST_ROWS
        place = self._begun % len(self._staged)
        event = self._copied[place]
        if event is not None and not self._device.finished(event):
            return  # the host is further ahead than an engine: guess by what is there
        n_rows, first, before = (
            staged.view(part.dtype).view(part.shape).numpy()
            for staged, part in zip(self._staged[place], self._given, strict=True)
        )
        n_rows[0], first[:rows], before[:, :rows] = rows, state, known
        for target, source in zip(self._given, self._staged[place], strict=True):
            self._device.copy(self._device.main, target.reshape(-1).view(torch.uint8), source)
        self._copied[place] = self._device.record(self._device.main)
        self._begun += 1

    def follow(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What ``layer`` lacked has been enqueued on main: guess for the layer ahead. Capture-safe.

        Args:
            ids, weights: ``[rows, top_k]`` with at most ``MOST_ROWS`` rows: the routing of ``layer``.
        """
        rows, ahead = len(ids), layer + self._distance
        state = self._states[layer + 1, :rows]
        self._kernels.observe(self._heads[layer], ids, weights, self._states[layer, :rows], state)
        if ahead >= len(self._tables.layers):
            return
        self._device.wait(self._stream, self._device.record(self._device.main))
        tables, scores = self._tables.layers[ahead], self._scores[:rows]
        with self._kernels.on(self._stream):
            self._kernels.evaluate(self._heads[ahead], state, self._known[ahead, :rows], scores)
            self._kernels.select_guess(tables, scores, self._n_rows, self._threshold, self._misses, self._ring)
            self._kernels.gather(tables, self._into_window[ahead], self._misses, self._loaded)
        self._under_way[ahead] = self._device.record(self._stream)

    def join(self, layer: int) -> None:
        """Main is about to look at the tables of ``layer``. Capture-safe."""
        if layer in self._under_way:
            self._device.wait(self._device.main, self._under_way.pop(layer))

    def settle(self) -> None:
        """Main waits for all guesses of a step that was left early."""
        for layer in list(self._under_way):
            self.join(layer)


def _parts_of(weights: "HeadWeights") -> tuple[Sequence[NDArray[np.float32]], ...]:
    return weights.maps, weights.heads, weights.outputs, weights.output_bias


def _uploaded(device: Device, array: NDArray[np.float32]) -> torch.Tensor:
    memory = zeros(device, array.shape, torch.float32)
    memory.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return memory
