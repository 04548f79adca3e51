"""Replay with hardware: the planner against a simulated clock, giving stalls and time per token."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy
from ..load_report import LoadReport
from ..pool.waves import streams
from ..prefetch.governor import PredictionGovernor, kind_of
from ..prefetch.planner import Estimates, Outlook, Phase, Planner
from ..prefetch.prefetcher import MOST_ROWS
from ..trace.trace import PREFILL, Trace
from .forecast import Forecast
from .hardware import HardwareProfile, ModelProfile
from .link import Link
from .replay_cache import ReplayCache, Tally
from .step_time import StepTime


@dataclass(frozen=True)
class TimelineReport:
    """What a replay would have taken. Seconds are of simulated time."""

    tally: Tally
    tokens: int
    steps: int
    total_seconds: float
    stall_seconds: float
    link_seconds: float
    decoding: "Share"
    """Of the steps in which a token was decoded; of all steps, where none was."""

    @property
    def stall_seconds_per_token(self) -> float:
        return self.decoding.stalled / max(1, self.decoding.tokens)

    @property
    def tpot_seconds(self) -> float:
        """Time per output token of one request: the mean length of a step in which tokens are decoded."""
        return self.decoding.seconds / max(1, self.decoding.steps)


@dataclass
class Share:
    """Some of the steps of a replay."""

    tokens: int = 0
    """Decoded by them, prefill not counted unless it was all they did."""
    steps: int = 0
    seconds: float = 0.0
    stalled: float = 0.0
    uses: int = 0
    waited: int = 0
    """Uses that a step stalled for."""

    def add(self, tokens: int, seconds: float, stalled: float, uses: int, waited: int) -> None:
        self.tokens, self.steps = self.tokens + tokens, self.steps + 1
        self.seconds, self.stalled = self.seconds + seconds, self.stalled + stalled
        self.uses, self.waited = self.uses + uses, self.waited + waited


class Books:
    """What the steps of a replay took, added up.

    Args:
        warm_up: steps that are left out, the first ones.
    """

    def __init__(self, warm_up: int = 0) -> None:
        self._everything, self._decoding = Share(), Share()
        self._left_out = warm_up

    def add(self, rows: int, prefill: int, seconds: float, stalled: float, uses: int, waited: int) -> None:
        """A step over ``rows``, of which ``prefill`` were not decoded; the rest as in ``Share``."""
        if self._left_out:
            self._left_out -= 1
            return
        self._everything.add(rows, seconds, stalled, uses, waited)
        if prefill < rows:
            self._decoding.add(rows - prefill, seconds, stalled, uses, waited)

    def close(self, tally: Tally, link_seconds: float) -> TimelineReport:
        """The report of all steps."""
        done = self._everything
        decoding = self._decoding if self._decoding.steps else done
        return TimelineReport(tally, done.tokens, done.steps, done.seconds, done.stalled, link_seconds, decoding)


def prefill_rows(trace: Trace, rows: NDArray[np.int64]) -> int:
    """How many of ``rows`` are tokens of prompts."""
    return 0 if trace.phase is None else int((trace.phase[rows] == PREFILL).sum())


def experts_of(trace: Trace, rows: NDArray[np.int64], layer: int) -> NDArray[np.int64]:
    """The distinct experts that ``rows`` use in a layer, numbered within it."""
    chosen = trace.experts[rows, layer]
    return (chosen[0] if len(rows) == 1 else np.unique(chosen)).astype(np.int64)


class Timeline:
    """One replay on one machine. Where there is a slot for every expert, all are there from the start.

    Args:
        warm_up: steps that fill the cache and do not count in the report's times and shares, the first ones.
    """

    def __init__(
        self,
        trace: Trace,
        slots: int,
        policy: EvictionPolicy,
        forecast: Forecast | None,
        hardware: HardwareProfile,
        model: ModelProfile,
        warm_up: int = 0,
    ):
        layers, experts, _ = trace.shape
        known = hardware.model is not None and hardware.model.record_bytes == model.record_bytes
        self._trace, self._forecast = trace, forecast
        self._hardware = hardware
        shown = hardware.model if known and hardware.model else model
        self._time = StepTime(hardware, shown, layers, experts, trace.top_k)
        self._cache, self._tally = ReplayCache(layers, experts, slots, policy), Tally()
        loads = hardware.load_seconds(model.record_bytes)
        chunk = min(loads[0], hardware.load_latency_seconds + hardware.chunk_bytes / hardware.bytes_per_second)
        self._link = Link(loads, chunk)
        layer_seconds = self._time.layer(trace.top_k, 1)
        self._planner = Planner(Estimates(loads[0], layer_seconds, chunk if len(loads) == 1 else loads[0]))
        self._governor = PredictionGovernor()
        self._under_way: list[list[int]] = [[] for _ in range(layers)]
        self._books = Books(warm_up)
        self._all_resident = slots >= layers * experts
        if self._all_resident:
            self._cache.release(self._cache.cache.acquire(np.arange(layers * experts)).slots)
        self._phase = Phase.DECODE
        self._seconds = self._stalled = self._predictor_seconds = 0.0

    def run(self, schedule: Iterable[NDArray[np.int64]]) -> TimelineReport:
        """Replay the steps of ``schedule``.

        Raises:
            ConfigError: the slots cannot hold the experts of one layer of one step.
        """
        for rows in schedule:
            prefill = prefill_rows(self._trace, rows)
            self._phase = Phase.PREFILL if prefill else Phase.DECODE
            self._seconds = self._stalled = self._predictor_seconds = 0.0
            tally = self._tally
            uses, waited = tally.accesses, tally.demand_loads + tally.late
            self._step(rows)
            waited = tally.demand_loads + tally.late - waited
            self._books.add(len(rows), prefill, self._seconds, self._stalled, tally.accesses - uses, waited)
        self._tally.add(self._cache.finish())
        return self._books.close(self._tally, self._link.busy_seconds)

    def _step(self, rows: NDArray[np.int64]) -> None:
        self._pass(self._hardware.step_overhead_seconds)
        self._cache.begin_step()
        self._planner.begin_step(self._phase)
        began, predicts = self._seconds, self._predicts(len(rows))
        merged = self._forecast.of_step(rows) if self._forecast is not None and predicts else None
        self._plan(merged, -1)
        _, experts, top_k = self._trace.shape
        streaming = streams(len(rows) * top_k, experts, self._cache.cache.num_slots)
        for layer in range(self._trace.num_layers):
            ids = layer * experts + experts_of(self._trace, rows, layer)
            self._layer(layer, ids, len(rows), merged, streaming)
        if len(rows) <= MOST_ROWS:
            predictor_seconds = None if merged is None else self._predictor_seconds
            self._governor.end_step(self._seconds - began, self._stalled, predictor_seconds)

    def _predicts(self, rows: int) -> bool:
        tried = rows <= MOST_ROWS and self._governor.begin_step(kind_of(self._phase, rows))
        return tried and not self._planner.is_off(self._phase)

    def _layer(
        self, layer: int, ids: NDArray[np.int64], rows: int, merged: NDArray[np.float32] | None, streaming: bool
    ) -> None:
        computing = self._time.layer(len(ids), rows)
        if not self._all_resident:
            computing += self._hardware.lookup_seconds
        busy_before = self._link.busy_seconds
        self._pass(computing / 2)
        pinned, report = self._stream(layer, ids, computing) if streaming else self._serve(layer, ids)
        self._note(report)
        self._stall(report.waited)
        self._plan(merged, layer)
        self._pass(computing / 2)
        self._cache.release(pinned)
        self._planner.estimates.note_layer(computing, self._link.busy_seconds - busy_before, report.misses)

    def _pass(self, seconds: float) -> None:
        self._link.pass_time(seconds)
        self._seconds += seconds

    def _stall(self, seconds: float) -> None:
        self._seconds += seconds
        self._stalled += seconds

    def _note(self, report: LoadReport) -> None:
        self._tally.add(report)
        self._planner.note(self._phase, report)

    def _serve(self, layer: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], LoadReport]:
        """Bring the layer's experts in: pinned slots."""
        ahead = self._under_way[layer]
        needed = set(ids.tolist())
        self._note(self._cache.withdraw(layer, self._link.cancel([e for e in ahead if e not in needed])))
        missing, pinned, report = self._cache.use(layer, ids)
        late = self._link.still_loading([expert for expert in ahead if expert in needed])
        ahead.clear()
        joining = self._link.demand(0, late)
        if len(missing) or late:
            overhead = len(missing) * self._hardware.demand_overhead_seconds
            self._pass(overhead + self._hardware.miss_overhead_seconds)
        loading = self._link.demand(len(missing), [])
        return pinned, report._replace(
            waited=joining + loading,
            demanded=len(missing),
            demand_seconds=loading,
            useful=report.useful - len(late),
            late=len(late),
            late_seconds=joining,
        )

    def _stream(self, layer: int, ids: NDArray[np.int64], computing: float) -> tuple[NDArray[np.int32], LoadReport]:
        """As ``_serve`` in a long prefill: most of a layer's loads run while the layer before computes."""
        missing, pinned, report = self._cache.stream(layer, ids)
        waited = self._link.demand(len(missing), []) - (computing if layer else 0.0)
        return pinned, report._replace(waited=max(0.0, waited))

    def _plan(self, merged: NDArray[np.float32] | None, layer: int) -> None:
        """``layer`` has been routed, -1 meaning that the step has just started."""
        if self._forecast is None or merged is None:
            return
        cache = self._cache
        farthest = self._planner.estimates.layers_worth_asking(self._hardware.predictor_seconds)
        for slot, distance in enumerate(self._forecast.distances):
            target = layer + distance
            if target >= self._trace.num_layers or distance > farthest:
                continue
            absent = cache.absent(target)
            if not absent.any():
                continue
            self._pass(self._hardware.predictor_seconds)
            self._predictor_seconds += self._hardware.predictor_seconds
            first = target * cache.experts
            cache.policy.expected[first : first + cache.experts] = merged[slot, target]
            outlook = Outlook(distance, merged[slot, target], absent)
            wanted = self._planner.plan(self._phase, outlook, self._link.queue_seconds)
            loading, report = cache.prefetch(target, first + wanted)
            self._note(report)
            self._under_way[target] += loading.tolist()
            self._link.prefetch(loading.tolist())
