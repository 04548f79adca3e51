"""Replay on a GPU: a window of slots per layer in its memory, all experts in host memory, loads beside layers."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace
from ..windows.speculation import MOST_ROWS, THRESHOLD
from .forecast import Forecast
from .hardware import HardwareProfile, ModelProfile
from .replay_cache import Tally
from .side_stream import SideStream
from .step_time import StepTime
from .timeline import Books, TimelineReport, experts_of, prefill_rows
from .windows import Windows, equal_windows

_MOST_CAPTURED_ROWS = 512
"""Steps of more rows run outside of graphs: there a stage is filled while the layer before computes."""


def padded(rows: int) -> int:
    """Rows of the smallest captured graph that holds so many."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


class DeviceTimeline:
    """One replay on one GPU.

    A *narrow* step runs on the windows: each layer's manager decides, what is missing is loaded, the kernel follows. A
    step that may use more experts of a layer than its window has slots is *wide*: it loads what it uses into a stage
    and leaves the windows alone, except those that lie in a stage.

    Args:
        slots: in all windows together.
        manager_seconds: what deciding costs per layer: one of ``hardware.manager``.
        forecast: from one distance; None where nothing is loaded speculatively.
        warm_up: as in ``Timeline``.

    Raises:
        ConfigError: a window would be too small for one token.
    """

    def __init__(
        self,
        trace: Trace,
        slots: int,
        hardware: HardwareProfile,
        model: ModelProfile,
        manager_seconds: float,
        forecast: Forecast | None = None,
        warm_up: int = 0,
    ):
        layers, experts, top_k = trace.shape
        assert forecast is None or len(forecast.distances) == 1
        self._trace, self._forecast = trace, forecast
        self._time = StepTime(hardware, model, layers, experts, top_k)
        windows = equal_windows(slots, layers, experts, top_k)
        self._windows = Windows(windows, experts, model.record_bytes)
        self._all_resident = min(windows) == experts
        """Every expert lies in its window from the start, and nothing has to be decided."""
        self._manager_seconds = manager_seconds
        self._latency = hardware.load_latency_seconds
        self._step_overhead = hardware.step_overhead_seconds
        self._side, self._books, self._tally = SideStream(), Books(warm_up), Tally()
        self._seconds = self._stalled = 0.0

    def run(self, schedule: Iterable[NDArray[np.int64]]) -> TimelineReport:
        """Replay the steps of ``schedule``."""
        tally = self._tally
        for rows in schedule:
            self._seconds, self._stalled = self._step_overhead, 0.0
            uses, waited = tally.accesses, tally.demand_loads + tally.late
            if not self._is_wide(len(rows)):
                self._narrow(rows)
            elif padded(len(rows)) <= _MOST_CAPTURED_ROWS:
                self._wide(rows, beside=False)
            else:
                self._wide(rows, beside=True)
            waited = tally.demand_loads + tally.late - waited
            prefill = prefill_rows(self._trace, rows)
            self._books.add(len(rows), prefill, self._seconds, self._stalled, tally.accesses - uses, waited)
        tally.wasted += self._windows.finish()
        return self._books.close(tally, self._side.busy_seconds)

    def _is_wide(self, rows: int) -> bool:
        return not self._all_resident and padded(rows) * self._trace.top_k > self._windows.smallest

    def _narrow(self, rows: NDArray[np.int64]) -> None:
        self._windows.begin_step()
        probabilities = None
        if self._forecast is not None and len(rows) <= MOST_ROWS and not self._all_resident:
            probabilities = self._forecast.of_step(rows)[0]
        for layer in range(self._trace.num_layers):
            ids = experts_of(self._trace, rows, layer)
            computing = self._time.layer(len(ids), len(rows))
            self._pass(computing / 2)
            self._load(layer, ids)
            if probabilities is not None:
                self._speculate(layer, probabilities)
            self._side.fork()
            self._pass(computing / 2)

    def _load(self, layer: int, ids: NDArray[np.int64]) -> None:
        self._tally.accesses += len(ids)
        if self._all_resident:
            return
        late = self._side.join()
        self._seconds += self._manager_seconds
        missing, right, wasted = self._windows.use(layer, ids)
        loading = self._latency + missing * self._time.record if missing else 0.0
        self._side.busy_seconds += loading
        self._stall(late + loading)
        tally, was_late = self._tally, right if late else 0
        tally.demand_loads += missing
        tally.useful += right - was_late
        tally.late += was_late
        tally.wasted += wasted

    def _speculate(self, layer: int, probabilities: NDArray[np.float32]) -> None:
        """One record at most."""
        assert self._forecast is not None
        distance = self._forecast.distances[0]
        target = layer + distance
        if target >= self._trace.num_layers:
            return
        worth = np.where(self._windows.absent(target), probabilities[target], 0)
        expert = int(worth.argmax())
        if worth[expert] > THRESHOLD:
            self._tally.wasted += self._windows.speculate(target, expert)
            self._tally.prefetch_loads += 1
            self._side.start(self._latency + self._time.record, distance)

    def _wide(self, rows: NDArray[np.int64], beside: bool) -> None:
        """Every layer's experts pass through a stage: those it uses, before it computes, or all ``beside`` the layer
        before."""
        self._tally.wasted += self._windows.lend()
        computing = 0.0
        for layer in range(self._trace.num_layers):
            used = len(experts_of(self._trace, rows, layer))
            filling = self._latency + (self._windows.experts if beside else used) * self._time.record
            self._side.busy_seconds += filling
            self._stall(max(0.0, filling - computing) if beside else filling)
            computing = self._time.layer(used, len(rows))
            self._seconds += computing
            self._tally.accesses += used
            self._tally.demand_loads += used

    def _pass(self, seconds: float) -> None:
        self._side.pass_time(seconds)
        self._seconds += seconds

    def _stall(self, seconds: float) -> None:
        self._seconds += seconds
        self._stalled += seconds
