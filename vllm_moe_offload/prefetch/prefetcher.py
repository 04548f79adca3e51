"""Asks a predictor about the layers ahead and a planner what of them to load, while a step goes through its layers.

It must never wait for a load: pools start loads behind everything that a pass waits for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..load_report import LoadReport
from ..predict.base import Predictor, RequestState, Step, union_probability
from ..running_mean import blend
from ..stats import Stats
from ..trace.recorder import RequestMaps, ScheduledTokens
from .governor import PredictionGovernor, kind_of
from .optional import Switch, optional
from .planner import Estimates, Outlook, Phase, Planner
from .request_states import RequestStates

MOST_ROWS = 32
"""Steps with more rows need nearly every expert of a layer: nothing to predict."""
_MOST_AHEAD = 3


class PrefetchPool(Protocol):
    """A pool of slots, as far as a prefetcher uses it. ``layer`` are the flat ids of one layer."""

    def absent(self, layer: range) -> NDArray[np.bool_]:
        """``[len(layer)]``: which experts have no slot and are not being loaded."""

    def enable_predictions(self) -> None:
        """From now on ``expect`` will be called: eviction takes account of it."""

    def expect(self, layer: range, probabilities: NDArray[np.float32] | float) -> None:
        """With these probabilities ``[len(layer)]`` the running step will use the layer's experts."""

    def prefetch(self, layer: range, experts: NDArray[np.int64]) -> LoadReport:
        """Start speculative loads, best first, as many as slots can be spared for."""

    def queued(self) -> int:
        """Loads under way that nobody waits for."""


class PrefetchLayer(NamedTuple):
    """The experts of one layer in the model's numbers, whichever of them this worker holds."""

    pool: PrefetchPool
    ids: range
    """Flat, of the experts this worker holds, in its own order."""
    held: NDArray[np.int64] | None
    """The model's numbers of these, ascending; None where they are all of the layer's."""
    experts: int
    """Of the layer, in the model."""

    def absent(self) -> NDArray[np.bool_]:
        """``[experts]``: which could be prefetched."""
        here = self.pool.absent(self.ids)
        if self.held is None:
            return here
        absent = np.zeros(self.experts, dtype=bool)
        absent[self.held] = here
        return absent

    def expect(self, probabilities: NDArray[np.float32]) -> None:
        """The running step will use the experts with these probabilities ``[experts]``."""
        self.pool.expect(self.ids, probabilities if self.held is None else probabilities[self.held])

    def expect_nothing(self) -> None:
        """The running step has no further use for the layer."""
        self.pool.expect(self.ids, 0.0)

    def prefetch(self, experts: NDArray[np.int64]) -> LoadReport:
        """Start loading ``experts``, best first, as far as there is room."""
        own = experts if self.held is None else np.searchsorted(self.held, experts)
        return self.pool.prefetch(self.ids, own + self.ids.start)


class Prefetcher:
    """Looks ahead for one worker, as long as nothing about it raises.

    Args:
        layers: in the order in which they run. From now on the eviction of their pools takes account of predictions.
        estimates: what is known of this machine; kept up to date here.
        clock: seconds.
        stats: count the loads that are started here. What a layer needed is counted by the caller of ``note``.
        switch: turned off by what raises.
    """

    def __init__(
        self,
        predictor: Predictor,
        layers: Sequence[PrefetchLayer],
        estimates: Estimates,
        clock: Callable[[], float],
        stats: Stats,
        switch: Switch | None = None,
    ):
        self.switch = switch or Switch()
        self.predictor = predictor
        self.planner = Planner(estimates)
        self._layers = layers
        self._pools = list({id(layer.pool): layer.pool for layer in layers}.values())
        for pool in self._pools:
            pool.enable_predictions()
        self._clock = clock
        self._stats = stats
        self._governor = PredictionGovernor()
        self._is_governed = False
        """Whether the governor was asked about the running step."""
        self._states = RequestStates(predictor)
        self._step: Step | None = None
        self._phase = Phase.DECODE
        self._layer = -1
        self._ask_seconds = 1e-4
        self._step_began = 0.0
        self._layer_began = 0.0
        self._predictor_seconds = 0.0
        """Of the running step, spent here."""
        self._step_stalled = 0.0
        self._stalled = 0.0
        self._demands = 0
        self._prefetches = 0

    def replace_pool(self, old: PrefetchPool, new: PrefetchPool) -> None:
        """``new`` takes the place of ``old``, with the same ids. Loads that ``old`` has started are forgotten."""
        self._layers = [layer._replace(pool=new) if layer.pool is old else layer for layer in self._layers]
        self._pools = [new if pool is old else pool for pool in self._pools]
        new.enable_predictions()

    @property
    def predicts(self) -> bool:
        """Whether the running step is predicted."""
        return self._step is not None and not self.switch.off

    @property
    def has_paused(self) -> bool:
        """Whether nothing is predicted, because it has not paid."""
        return self._governor.disabled or self.planner.is_off(Phase.DECODE)

    @optional
    def begin_step(self, rows: Sequence[ScheduledTokens], embeddings: Mapping[str, NDArray[np.float32]]) -> None:
        """The forward pass over ``rows`` starts. ``embeddings``: of requests, where known."""
        self._step_began = began = self._clock()
        self._step, self._layer = None, -1
        self._predictor_seconds = self._step_stalled = self._stalled = 0.0
        self._phase = Phase.PREFILL if any(part.is_prefill for part in rows) else Phase.DECODE
        self._states.start(rows, embeddings)
        num_rows = sum(len(part.tokens) for part in rows)
        self._is_governed = 0 < num_rows <= MOST_ROWS
        self.planner.begin_step(self._phase)
        predicts = self._is_governed and self._governor.begin_step(kind_of(self._phase, num_rows))
        predicts = predicts and not self.planner.is_off(self._phase)
        if predicts:
            self._step = self.predictor.begin(self._states.contexts(rows))
            self._look_from(-1)
            self._predictor_seconds = self._clock() - began

    @optional
    def observe(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """``layer`` has routed the rows of the step, ``[rows, K]``; its experts are going to be asked for."""
        if self._step is None:
            return
        now = self._clock()
        if self._layer >= 0:
            seconds = max(now - self._layer_began - self._stalled, 1e-6)
            loads = self._demands + self._prefetches
            self.planner.estimates.note_layer(seconds, loads * self.planner.estimates.load_seconds, self._demands)
        self._stalled, self._demands, self._prefetches = 0.0, 0, 0
        self._layer = layer
        self._layers[layer].expect_nothing()
        self._step.observe(layer, experts, weights)
        self._layer_began = self._clock()
        self._predictor_seconds += self._layer_began - now

    @optional
    def look_ahead(self) -> None:
        """The experts of the layer observed last are there: predict the next ones while it computes."""
        if self._step is None:
            return
        began = self._clock()
        self._look_from(self._layer)
        took = self._clock() - began
        self._layer_began += took
        self._predictor_seconds += took

    @optional
    def note(self, report: LoadReport) -> None:
        """What the forward pass needed of a pool, and what became of speculative loads."""
        self._stalled += report.waited
        self._step_stalled += report.waited
        self._demands += report.demanded
        self.planner.note(self._phase, report)

    @optional
    def end_step(self, maps: Sequence[RequestMaps]) -> None:
        """The pass is over; ``maps`` are what its rows have been through."""
        if self._is_governed:
            seconds = self._clock() - self._step_began
            predictor_seconds = None if self._step is None else self._predictor_seconds
            self._governor.end_step(seconds, self._step_stalled, predictor_seconds)
        self._states.remember(maps)
        self._step, self._is_governed = None, False

    def end_request(self, request: str) -> RequestState | None:
        """A request has ended. Returns what was known of it."""
        return self._states.end(request)

    def _look_from(self, layer: int) -> None:
        assert self._step is not None
        estimates = self.planner.estimates
        distance = min(estimates.layers_worth_asking(max(self._ask_seconds, 1e-6)), _MOST_AHEAD)
        farthest = min(layer + distance, self.predictor.shape.layers - 1)
        began = self._clock()
        for number in range(layer + 1, farthest + 1):
            target = self._layers[number]
            absent = target.absent()
            if absent.any():
                probabilities = union_probability(self._step.predict(number))
                target.expect(probabilities)
                queued = sum(pool.queued() for pool in self._pools)
                outlook = Outlook(number - layer, probabilities, absent)
                wanted = self.planner.plan(self._phase, outlook, queued * estimates.load_seconds)
                if len(wanted):
                    report = target.prefetch(wanted)
                    self._stats.add(report)
                    self._stats.prefetch_expected += float(probabilities[wanted[: report.started]].sum())
                    self._prefetches += report.started
                    self.planner.note(self._phase, report)
            now = self._clock()
            self._ask_seconds = blend(self._ask_seconds, now - began)
            began = now
