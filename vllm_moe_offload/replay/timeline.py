"""Replay with hardware: the planner against a simulated clock, giving stalls and time per token."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy
from ..history.trace import PREFILL, Trace
from ..prefetch.estimates import Estimates
from ..prefetch.planner import Outlook, Phase, Planner
from .forecast import Forecast
from .hardware import HardwareProfile, ModelProfile
from .link import Link
from .residency import Residency, Tally


@dataclass(frozen=True)
class TimelineReport:
    """What a replay would have taken. Seconds are of simulated time."""

    tally: Tally
    tokens: int
    steps: int
    total_seconds: float
    stall_seconds: float
    link_seconds: float

    @property
    def stall_seconds_per_token(self) -> float:
        return self.stall_seconds / max(1, self.tokens)

    @property
    def tpot_seconds(self) -> float:
        """Time per output token of one request: the mean length of a step."""
        return self.total_seconds / max(1, self.steps)


class Timeline:
    """One replay on one machine."""

    def __init__(
        self,
        trace: Trace,
        slots: int,
        policy: EvictionPolicy,
        forecast: Forecast | None,
        hardware: HardwareProfile,
        model: ModelProfile,
    ):
        layers, experts, _ = trace.shape
        self._trace, self._forecast = trace, forecast
        self._hardware, self._model = hardware, model
        self._residency = Residency(layers, experts, slots, policy)
        load = hardware.load_latency_seconds + model.record_bytes / hardware.bytes_per_second
        chunk = min(load, hardware.load_latency_seconds + hardware.chunk_bytes / hardware.bytes_per_second)
        self._link = Link(load, chunk)
        self._planner = Planner(Estimates(load, self._layer_seconds(trace.top_k, 1), chunk))
        self._chosen = trace.experts.astype(np.int64) + (np.arange(layers) * experts)[None, :, None]
        self._under_way: list[list[int]] = [[] for _ in range(layers)]
        self._total = self._stalled = 0.0

    def run(self, schedule: Iterable[NDArray[np.int64]]) -> TimelineReport:
        """Replay the steps of ``schedule``.

        Raises:
            ConfigError: the slots cannot hold the experts of one layer of one step.
        """
        tokens = steps = 0
        for rows in schedule:
            self._step(rows)
            tokens, steps = tokens + len(rows), steps + 1
        tally = self._residency.finish()
        return TimelineReport(tally, tokens, steps, self._total, self._stalled, self._link.busy_seconds)

    def _step(self, rows: NDArray[np.int64]) -> None:
        phase = self._phase(rows)
        self._residency.begin_step()
        self._planner.begin_step(phase)
        merged = None if self._forecast is None else self._forecast.of_step(rows)
        self._plan(merged, -1, phase)
        for layer in range(self._trace.num_layers):
            ids = self._chosen[rows[0], layer] if len(rows) == 1 else np.unique(self._chosen[rows, layer])
            computing = self._layer_seconds(len(ids), len(rows))
            self._link.pass_time(computing / 2)
            busy_before = self._link.busy_seconds
            wasted_before = self._residency.tally.wasted
            stall, pinned, demands = self._serve(layer, ids, phase)
            self._plan(merged, layer, phase)
            self._link.pass_time(computing / 2)
            self._residency.release(pinned)
            for _ in range(self._residency.tally.wasted - wasted_before):
                self._planner.note_wasted(phase)
            self._planner.estimates.note_layer(computing, self._link.busy_seconds - busy_before, demands)
            self._total += computing + stall
            self._stalled += stall

    def _serve(self, layer: int, ids: NDArray[np.int64], phase: Phase) -> tuple[float, NDArray[np.int32], int]:
        """Bring the layer's experts in: seconds stalled, pinned slots, demand loads."""
        ahead = self._under_way[layer]
        missing, pinned = self._residency.use(layer, ids)
        needed = set(ids.tolist())
        used = [expert for expert in ahead if expert in needed]
        late = self._link.still_loading(used)
        self._link.cancel([expert for expert in ahead if expert not in needed])
        stall = self._link.demand(len(missing), late)
        self._residency.was_late(len(late))
        for expert in used:
            if expert in late:
                self._planner.note_late(phase, stall / max(1, len(late) + len(missing)))
            else:
                self._planner.note_useful(phase)
        ahead.clear()
        return stall, pinned, len(missing)

    def _plan(self, merged: NDArray[np.float32] | None, layer: int, phase: Phase) -> None:
        """``layer`` has been routed, -1 meaning that the step has just started."""
        if self._forecast is None or merged is None or self._planner.is_off(phase):
            return
        residency = self._residency
        for slot, distance in enumerate(self._forecast.distances):
            target = layer + distance
            if target >= self._trace.num_layers:
                continue
            first = target * residency.experts
            residency.foresight.expected[first : first + residency.experts] = merged[slot, target]
            outlook = Outlook(distance, merged[slot, target], residency.absent(target))
            wanted = self._planner.plan(phase, outlook, self._link.queue_seconds)
            loading = residency.prefetch(target, first + wanted).tolist()
            self._under_way[target] += loading
            self._link.prefetch(loading)

    def _layer_seconds(self, distinct: int, rows: int) -> float:
        """A layer reads its dense weights and its distinct experts once, or computes for longer than that."""
        model, hardware = self._model, self._hardware
        reading = (model.dense_bytes_per_layer + distinct * model.record_bytes) / hardware.memory_bytes_per_second
        flops = 2 * rows * (self._trace.top_k * model.expert_parameters + model.dense_bytes_per_layer // 2)
        return hardware.layer_overhead_seconds + max(reading, flops / hardware.flops_per_second)

    def _phase(self, rows: NDArray[np.int64]) -> Phase:
        phase = self._trace.phase
        return Phase.PREFILL if phase is not None and (phase[rows] == PREFILL).any() else Phase.DECODE
