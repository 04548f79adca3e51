"""Has a device predict within its steps, where the host sees nothing of a step before it is over.

The device has the learned heads, and what each layer is routed to. The host gives it the heads whenever there are new
ones, and before a step what is known of its rows: their tokens, and what earlier tokens were routed to as far as that
has come back. Steps are timed by the device; the governor decides by these times, which come a step or two late.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..predict.base import RequestState
from ..predict.heads import HeadsPredictor, HeadWeights
from ..predict.history import HistoryPredictor
from ..trace.recorder import RequestMaps, ScheduledTokens
from ..trace.trace import UNKNOWN_TOKEN
from .governor import PredictionGovernor, kind_of
from .optional import Switch, optional
from .planner import Phase
from .request_states import RequestStates


class PredictingDevice(Protocol):
    """A device that predicts with learned heads."""

    step: int
    """The number of the step that is next."""

    def load(self, weights: HeadWeights) -> None:
        """Predict by these heads as soon as they are there."""

    def begin(self, state: NDArray[np.float32], known: NDArray[np.float32]) -> bool:
        """The step that is next is predicted: ``[rows, state]`` before its first layer, ``[layers, rows, hidden]``.

        Returns whether it is: not while heads are on their way.
        """


class _Step(NamedTuple):
    number: int
    kind: int
    is_predicted: bool


class DevicePrefetcher:
    """Looks ahead for one worker, as long as nothing about it raises.

    Args:
        predictor: whose heads are used as soon as it has some. Its neighbours would need the host between layers.
        most_rows: of steps that the device predicts.
        tokens_come_late: when a step is enqueued, only the device knows yet which tokens it is going to read; waiting
            for them would hold the device up.
        switch: turned off by what raises.
    """

    def __init__(
        self,
        predictor: HistoryPredictor,
        device: PredictingDevice,
        most_rows: int,
        tokens_come_late: bool,
        switch: Switch | None = None,
    ):
        self.switch = switch or Switch()
        self._tokens_come_late = tokens_come_late
        self._predictor, self._device, self._most_rows = predictor, device, most_rows
        predictor.learns_from_each_token = False
        self._states = RequestStates(predictor)
        self._heads: HeadsPredictor | None = None
        """Those that the device was given last."""
        self._governor = PredictionGovernor()
        self._timed: deque[_Step] = deque()
        """Steps that the governor waits for."""

    @property
    def has_paused(self) -> bool:
        """Whether nothing is predicted, because it has not paid."""
        return self._governor.disabled

    @optional
    def begin_step(
        self,
        rows: Sequence[ScheduledTokens],
        embeddings: Mapping[str, NDArray[np.float32]],
        wait_for_tokens: Callable[[], None],
    ) -> None:
        """The forward pass over ``rows`` is enqueued next.

        Args:
            embeddings: of requests, where known.
            wait_for_tokens: until it returns, those of ``rows`` may be anything.
        """
        self._states.start(rows, embeddings)
        heads = self._predictor.heads
        if heads is not None and heads is not self._heads:
            self._device.load(heads.weights)
            self._heads = heads
        count = sum(len(part.tokens) for part in rows)
        if not 0 < count <= self._most_rows:
            return
        phase = Phase.PREFILL if any(part.is_prefill for part in rows) else Phase.DECODE
        kind = kind_of(phase, count)
        is_predicted = False
        if heads is not None and self._governor.predicts(kind):
            if self._tokens_come_late:
                rows = [part._replace(tokens=np.full(len(part.tokens), UNKNOWN_TOKEN)) for part in rows]
            else:
                wait_for_tokens()
            is_predicted = self._device.begin(*heads.before_step(self._states.contexts(rows)))
        self._timed.append(_Step(self._device.step, kind, is_predicted))

    @optional
    def note_time(self, number: int, seconds: float) -> None:
        """Step ``number`` has taken so long on the device. Steps come in order; of some nothing is known."""
        while self._timed and self._timed[0].number < number:
            self._timed.popleft()
        if not self._timed or self._timed[0].number > number or self._heads is None:
            return
        step = self._timed.popleft()
        self._governor.begin_step(step.kind)
        # how much of a step is waiting for loads, the device does not say: it may be all of it
        self._governor.end_step(seconds, stalled=seconds, predictor_seconds=0.0 if step.is_predicted else None)

    @optional
    def end_step(self, maps: Sequence[RequestMaps]) -> None:
        """``maps`` are what the rows of a step have been through, which has ended a while ago."""
        self._states.remember(maps)

    def end_request(self, request: str) -> RequestState | None:
        """A request has ended, and all of its steps are known. Returns what was known of it."""
        return self._states.end(request)
