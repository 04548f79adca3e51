"""Speculative loads inside a step: while a layer computes, the device predicts a layer ahead and loads what that lacks.

The learned heads (``predict/heads.py``) are evaluated where routing is, on a stream of their own. At most one record a
layer goes straight into the window of the layer ahead, in as many parts as there are layers before: a part moves while
one layer computes, and never beside what a layer waits for. Such a load may be wrong, never harmful: it changes what is
loaded, not what is computed.

What changes between steps are contents of memory, never addresses: graphs captured once remain valid when heads are
replaced, and where nothing is to be loaded speculatively.
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
from .speculation import DISTANCE, MOST_ROWS, THRESHOLD
from .step_log import AHEAD

if TYPE_CHECKING:
    from ..predict.heads import HeadWeights

_RECORDS = 1 + 3
"""Numbers of a list of one miss."""
_GIVEN = 2
"""int64: the rows that are loaded for ahead, and the number of the step in which they run."""


class HeadSizes(NamedTuple):
    """Of one layer's head."""

    experts: int
    width: int
    """Of the state."""
    hidden: int


class Head(NamedTuple):
    """One layer's weights on the device, float32; ``speculative_kernels`` has the shapes."""

    added: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor
    bias: torch.Tensor


class SpeculativeKernels(Kernels, Protocol):
    """Work of speculative loads. ``given``: int64 ``[2]``, rows and their step: in any other step there are none."""

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """What is enqueued meanwhile goes to ``stream``."""

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
        """``after`` = ``before`` and what a layer's choices add: ``[rows, width]`` each."""

    def evaluate(
        self,
        head: Head,
        given: torch.Tensor,
        state: torch.Tensor,
        known: torch.Tensor,
        scores: torch.Tensor,
        ring: Ring,
    ) -> None:
        """``scores`` ``[rows, experts]``: the logits of each expert's use."""

    def select_speculative(
        self,
        layer: LayerTables,
        given: torch.Tensor,
        scores: torch.Tensor,
        threshold: float,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        """``WindowTables.speculate`` by the best of the rows; lists what it loads."""


class DeviceSpeculation:
    """Of one model's layers, whose heads are all of the same sizes.

    Args:
        into_window: by layer the table by which ``gather`` finds its components.
        ring: that of the steps.
        distance: layers that a speculative load is ahead.
        threshold: probability above which an expert is loaded.
    """

    def __init__(
        self,
        device: Device,
        sizes: HeadSizes,
        tables: DeviceTables,
        into_window: Sequence[torch.Tensor],
        kernels: SpeculativeKernels,
        ring: Ring,
        *,
        distance: int = DISTANCE,
        threshold: float = THRESHOLD,
    ):
        assert distance > 0 and 0 < threshold < 1
        layers = len(tables.layers)
        self._device, self._tables, self._into_window, self._kernels = device, tables, into_window, kernels
        self._ring, self._distance = ring, distance
        self._threshold = math.log(threshold / (1 - threshold))
        self._heads = _HeadsOnDevice(device, sizes, layers)
        self._given = _Given(device, sizes, layers)
        self._states = zeros(device, (layers, MOST_ROWS, sizes.width), torch.float32)
        """Behind each layer."""
        self._scores = zeros(device, (MOST_ROWS, sizes.experts), torch.float32)
        self._misses = zeros(device, (distance, _RECORDS), torch.int32)
        """What is on its way to the next ``distance`` layers."""
        self._loaded = Ring(device, 1, layers, 1)
        """Where the bytes of speculative loads are counted."""
        self._stream = device.stream("speculative loads")
        self._under_way: Event | None = None
        """Behind what speculative loads do beside a layer, until main has waited for it."""
        self.step = 0
        """The number of the step that is next or under way, in the ring."""
        self._followed: int | None = None
        """The layer of the running step that was followed last; None where none was."""
        self.enabled = True
        """Whether layers launched now load ahead. What is captured in a graph must; what runs at once need not."""

    @property
    def loaded(self) -> bool:
        """Whether all of the latest heads are on the device."""
        return self._heads.complete

    def load(self, weights: "HeadWeights") -> None:
        """Predict by these heads as soon as they are on the device: a layer's are copied before each step."""
        self._heads.replace(weights)

    def begin_step(self, step: int) -> None:
        """Before a step, outside of graphs. Nothing is loaded speculatively in it unless ``begin`` follows.

        Args:
            step: its number in the ring.
        """
        self.step, self.enabled = step, False
        self._heads.copy_next()

    def begin(self, state: NDArray[np.float32], known: NDArray[np.float32]) -> bool:
        """Behind ``begin_step``: what is known of the rows.

        Args:
            state: ``[rows, width]`` before the first layer, of 1 to ``MOST_ROWS`` rows.
            known: ``[layers, rows, hidden]``, as ``HeadWeights.hidden_before``.

        Returns:
            whether the step loads ahead: not while heads are on their way.
        """
        assert 0 < len(state) <= MOST_ROWS
        self.enabled = self.loaded and self._given.give(self.step, state, known)
        return self.enabled

    def end_step(self) -> None:
        """The step has been enqueued, or was left early. What is launched from now on is captured, or warms up."""
        self.join()
        if self._followed is not None:  # left early: tables name records of which a part has been copied
            for layer in range(self._followed + 1, len(self._tables.layers) - 1):
                for target in self._targets(layer, self._followed + self._distance):
                    self._go_on(target, layer)
        self._followed, self.enabled = None, True

    def follow(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What ``layer`` lacked has been enqueued on main: go on with loads for the layers ahead. Capture-safe.

        Args:
            ids, weights: ``[rows, top_k]``: the routing of ``layer``; of more than ``MOST_ROWS`` rows, nothing is done.
        """
        layers, rows = len(self._tables.layers), len(ids)
        if not self.enabled or rows > MOST_ROWS or layer + 1 == layers:
            return
        ahead, after = layer + self._distance, self._states[layer, :rows]
        if ahead < layers:  # on main, which owns the memory of ids and weights
            before = (self._states[layer - 1] if layer else self._given.state)[:rows]
            head = self._heads.of_layer[layer]
            self._kernels.observe(head, self._given.rows, ids, weights, before, after, self._ring)
        self._device.wait(self._stream, self._device.record(self._device.main))
        with self._kernels.on(self._stream):
            if ahead < layers:
                self._choose(ahead, after)
            for target in self._targets(layer, ahead):
                self._go_on(target, layer)
        self._under_way = self._device.record(self._stream)
        self._followed = layer if layer + 2 < layers else None

    def join(self) -> None:
        """Main is about to look at the tables of the next layer. Capture-safe."""
        if self._under_way is not None:
            self._device.wait(self._device.main, self._under_way)
            self._under_way = None

    def _targets(self, layer: int, last: int) -> range:
        """Layers up to ``last`` of whose speculative loads a part moves beside ``layer``."""
        return range(max(layer + 1, self._distance), min(last + 1, len(self._tables.layers)))

    def _choose(self, layer: int, state: torch.Tensor) -> None:
        """What to load for ``layer``, for which main was joined when it was last looked at."""
        rows, given, head = len(state), self._given, self._heads.of_layer[layer]
        scores, tables = self._scores[:rows], self._tables.layers[layer]
        self._kernels.evaluate(head, given.rows, state, given.known[layer, :rows], scores, self._ring)
        misses = self._misses[layer % self._distance]
        self._kernels.select_speculative(tables, given.rows, scores, self._threshold, misses, self._ring)

    def _go_on(self, target: int, layer: int) -> None:
        """Load the part that moves beside ``layer`` of what was chosen for ``target``."""
        misses, part = self._misses[target % self._distance], layer - (target - self._distance)
        tables, components = self._tables.layers[target], self._into_window[target]
        self._kernels.gather(tables, components, misses, self._loaded, part, self._distance)


class _HeadsOnDevice:
    """Heads of all layers in memory that stays, filled from the host layer by layer."""

    def __init__(self, device: Device, sizes: HeadSizes, layers: int):
        self._device = device
        experts, width, hidden = sizes
        shapes = (experts, 2 * width), (hidden, width), (experts, hidden), (experts,)
        floats = [math.prod(shape) for shape in shapes]
        self._layers = zeros(device, (layers, sum(floats)), torch.float32)
        self.of_layer = [
            Head(*(part.view(shape) for part, shape in zip(layer.split(floats), shapes, strict=True)))
            for layer in self._layers
        ]
        self._staged = device.allocate_pinned(self._layers[0].nbytes)
        self._copied: Event | None = None
        self._new: HeadWeights | None = None
        self._next = 0
        """The layer of ``_new`` whose head is copied next."""
        self.complete = False
        """Whether every layer has the head that was given last."""

    def replace(self, weights: "HeadWeights") -> None:
        self._new, self._next, self.complete = weights, 0, False

    def copy_next(self) -> None:
        """Enqueue one layer's head on main, if there is one to copy and the copy before is finished."""
        if self._copied is not None and not self._device.finished(self._copied):
            return
        if self._new is None or self._next == len(self.of_layer):
            self.complete = self._new is not None
            return
        layer, new = self._next, self._new
        parts = new.maps[layer], new.heads[layer], new.outputs[layer], new.output_bias[layer]
        np.concatenate([part.reshape(-1) for part in parts], out=self._staged.view(torch.float32).numpy())
        self._device.copy(self._device.main, self._layers[layer].view(torch.uint8), self._staged)
        self._copied = self._device.record(self._device.main)
        self._next += 1


class _Given:
    """What the host knows of the rows of a step, in one block that is copied at once."""

    def __init__(self, device: Device, sizes: HeadSizes, layers: int):
        self._device = device
        self._shapes = (MOST_ROWS, sizes.width), (layers, MOST_ROWS, sizes.hidden)
        nbytes = 8 * _GIVEN + 4 * sum(math.prod(shape) for shape in self._shapes)
        self._on_device = device.allocate(nbytes)
        self.rows, self.state, self.known = self._parts(self._on_device)
        self._staged = [device.allocate_pinned(nbytes) for _ in range(AHEAD + 1)]
        self._copied: list[Event | None] = [None] * len(self._staged)
        self._begun = 0

    def give(self, step: int, state: NDArray[np.float32], known: NDArray[np.float32]) -> bool:
        """Enqueue it on main; False where the host is further ahead than an engine."""
        place, rows = self._begun % len(self._staged), len(state)
        event = self._copied[place]
        if event is not None and not self._device.finished(event):
            return False
        header, first, before = (part.numpy() for part in self._parts(self._staged[place]))
        header[:], first[:rows], before[:, :rows] = (rows, step), state, known
        self._device.copy(self._device.main, self._on_device, self._staged[place])
        self._copied[place] = self._device.record(self._device.main)
        self._begun += 1
        return True

    def _parts(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        header, floats = block[: 8 * _GIVEN].view(torch.int64), block[8 * _GIVEN :].view(torch.float32)
        state, known = floats.split([math.prod(shape) for shape in self._shapes])
        return header, state.view(self._shapes[0]), known.view(self._shapes[1])
