"""Whether predicting is worth its time: the planner weighs bytes, this compares stretches of steps by the clock.

A predicted step may cost later ones time: they miss what it evicted. So whole stretches are compared: a *run* of
predicted steps and the *washout* after it, in which the evicted experts come back, with the *rests* before and after,
in which nothing is predicted. What run and washout took beyond the mean of the two rests is charged to a loss budget;
what they saved is added. The budget also grows by a small share of all time and has an upper bound. Below zero,
nothing is predicted until it has grown enough for a trial. This is a switchback experiment (Bojinov, Simchi-Levi and
Zhao, 2023) under a budget for losses as in conservative bandits (Wu, Shariff, Lattimore and Szepesvari, 2016).

Two rests cancel what changes steadily; random lengths of runs, what changes periodically. A pause counts as at most
``OUTLIER`` times the median step, in all stretches alike, and a round as at most ``_ROUND`` steps unless it lost more
than that against *both* rests. So neither a pause nor a change in the middle of a run decides alone.

Guarantees, where a predicted step affects no more than the next ``_WASHOUT`` steps:

- In any ``N`` steps the measured loss is at most ``_SHARE * N + _MOST + _ROUND`` steps' worth of time: 98 of 10,000,
  below 1 %. The true loss differs by the error of the measurement. Its mean is zero; it grows with the noise of steps
  and shrinks with the square root of their number. ``benchmarks/policy.py`` simulates how large it becomes.
  Steps' worth are those of the steps being served: where steps become ten times shorter after a loss, that loss weighs
  ten times as much beside them, which nobody can know beforehand.
- A trial comes within ``(_TRIAL + _ROUND) / _SHARE`` = 4,800 steps, whatever came before; only after a round that lost
  more than ``_ROUND`` against both rests it may take ``(_TRIAL + _WORST) / _SHARE`` = 27,200. From then on, one round
  that gains clearly suffices for long runs, or two that gain at all.
- Prediction that has begun to lose is stopped when it has lost ``_MOST`` steps' worth of time and the round's share.

No policy that only sees the lengths of steps can do better than the noise allows: a difference between two arms of
``N / 2`` steps each is known to ``2 * noise / sqrt(N)``: over 10,000 steps whose lengths vary by 50 % to 1 %, so losses
of 2 % and gains of 2 % cannot be told from none within one window with less than a few such standard errors of doubt.
"""

import math
from collections import deque
from random import Random

from .planner import Phase
from .stretch import OUTLIER, GrowingStretch, TimedStep, robust_mean, sum_up

_SHARE = 0.005
"""Of all time: what predicting may lose in the long run."""
_MOST = 32.0
"""Steps' worth of time: the most the loss budget holds, so the most of earlier gains that can be lost again."""
_ROUND = 16.0
"""Steps' worth: the most one round counts, half of ``_MOST``, so that one round never ends what has gained so far."""
_DOUBTFUL_GAIN = 4.0
"""Steps' worth: the most a short run gains that chance may have favoured. Two such in a row make runs long."""
_CLEAR = 3.0
"""Standard errors: a gain of more is none of chance."""
_WORST = 128.0
"""Steps' worth: the most a round is charged with if it lost so much against both rests."""
_TRIAL = 8.0
"""Steps' worth the loss budget must hold for a trial; a run that seems to lose more ends at once."""
_SHORT, _LONG = 64, 640
"""Steps of a run, in the mean: while in doubt, and while the loss budget is at least half full."""
_WASHOUT = 32
"""Steps in which what predicted steps evicted is missed: most of what is in use passes through the slots in fewer."""
_REST = 64
"""Steps compared with on either side: as many as a short run, and a tenth of a long one."""
_FIRST_REST = 8
"""Before the very first run: a short service should not end before anything is predicted."""
_FIRST_STEPS = 4
"""Of each kind are left alone, to know how long they take."""
_OLD_STEPS = 8
"""What was known of a kind's length counts like so many steps of the latest rest."""


def kind_of(phase: Phase, rows: int) -> int:
    """Number of the steps that take about as long as one of ``phase`` over ``rows``."""
    return len(Phase) * rows.bit_length() + phase.value


class PredictionGovernor:
    """Decides in which steps to predict. Deterministic: the same ``seed`` and steps give the same decisions."""

    def __init__(self, seed: int = 0) -> None:
        self.disabled = False
        """Nothing is predicted, because it has not paid."""
        self._on_trial = True
        """The round under way is the first after being disabled: a loss ends it, whatever is left of the budget."""
        self._loss_budget = 0.0
        """Seconds that predicting may still lose."""
        self._mean = 0.0
        """Seconds of a step that is left alone; 0 until the first rest is over."""
        self._lengths = _Lengths()
        self._random = Random(seed)
        self._kind = 0
        self._before: list[TimedStep] = []
        """The rest before the run."""
        self._charged: list[TimedStep] = []
        """The run and its washout."""
        self._rest: deque[TimedStep] = deque(maxlen=_REST)
        """The rest after them, which is the one before the next."""
        self._rest_due = _FIRST_REST
        self._run = _Run(0, 0.0, 1.0)
        self._washout_left = 0

    def begin_step(self, kind: int) -> bool:
        """A step of this ``kind`` starts: whether to predict in it."""
        self._kind = kind
        if not self._run.left and not self._washout_left and len(self._rest) >= self._rest_due:
            self._end_round()
            if not self.disabled:
                self._start_run()
        return self.predicts(kind)

    def predicts(self, kind: int) -> bool:
        """What ``begin_step`` has decided last, for a step of this ``kind``."""
        return self._run.left > 0 and self._lengths.knows(kind)

    def end_step(self, seconds: float, stalled: float, predictor_seconds: float | None) -> None:
        """The step begun last is over.

        Args:
            seconds: it took, all in all.
            stalled: of these, waiting for loads.
            predictor_seconds: of these, predicting; None where nothing was predicted.
        """
        seconds = max(seconds, 1e-9)
        grown = self._loss_budget + _SHARE * min(seconds, OUTLIER * self._mean)
        self._loss_budget = min(grown, _MOST * self._mean)
        if not self._lengths.knows(self._kind):
            self._lengths.meet(self._kind, seconds)
            return
        step = TimedStep(self._kind, seconds, stalled, predictor_seconds or 0.0)
        if self._run.left:
            self._charged.append(step)
            self._run.add(seconds / self._lengths.usual[self._kind])
            if not self._run.left:
                self._washout_left, self._rest_due = _WASHOUT, _REST
                self._rest.clear()
        elif self._washout_left:
            self._charged.append(step)
            self._washout_left -= 1
        else:
            self._rest.append(step)

    def _start_run(self) -> None:
        self._before, self._charged = list(self._rest), []
        self._lengths.learn(self._before)
        is_sure = self._loss_budget >= _MOST / 2 * self._mean
        steps = (_LONG if is_sure else _SHORT) * self._random.uniform(0.75, 1.25)
        may_lose = max(_TRIAL, min(_ROUND, self._loss_budget / self._mean))
        self._run = _Run(round(steps), may_lose, sum_up(self._before, self._lengths.usual).level)

    def _end_round(self) -> None:
        if self._charged:
            loss = self._loss()
            self._charged = []
            self._loss_budget -= loss * self._mean
            if self._loss_budget < 0 or (self._on_trial and loss > 0):
                self.disabled = True
                self._loss_budget = min(self._loss_budget, 0.0)
            self._on_trial = False
        elif not self._mean:
            self._mean = self._mean_of_rest()
            self._loss_budget = _TRIAL * self._mean
        if self.disabled and self._loss_budget >= _TRIAL * self._mean:
            self._mean = self._mean_of_rest()
            if self._loss_budget >= _TRIAL * self._mean:
                self.disabled, self._on_trial = False, True

    def _loss(self) -> float:
        """What the round has lost, in steps' worth of time; below zero, gained."""
        usual = self._lengths.usual
        before, after, charged = (sum_up(steps, usual) for steps in (self._before, self._rest, self._charged))
        rested = len(self._before) + len(self._rest)
        level = (before.seconds + after.seconds) / (before.usual + after.usual)
        self._mean = (before.seconds + after.seconds) / rested
        predicted = self._run.steps
        loss = (charged.seconds - level * charged.usual) / self._mean
        if loss > _ROUND:
            against_slower = (charged.seconds - max(before.level, after.level) * charged.usual) / self._mean
            loss = min(max(_ROUND, against_slower), _WORST)
        count, noise = len(self._charged), max(after.variance, charged.variance)
        is_clear = -loss > _CLEAR * math.sqrt(noise * (count + count**2 / rested))
        loss = max(loss, -_ROUND if is_clear or predicted > 2 * _SHORT else -_DOUBTFUL_GAIN)
        # Predicting saves no more than the stalls there are: this part of the loss is known without noise.
        stalls = (before.stalled + after.stalled) / rested * predicted
        return max(loss, min(_ROUND, (charged.predictor_seconds - stalls) / self._mean))

    def _mean_of_rest(self) -> float:
        return sum_up(self._rest, self._lengths.usual).seconds / len(self._rest)


class _Run:
    """Steps predicted in a row.

    Args:
        left: how many there may be.
        may_lose: steps' worth of time; the run ends when it seems to have lost more.
        level: of the steps before it, as a multiple of the usual.
    """

    def __init__(self, left: int, may_lose: float, level: float):
        self.left, self._may_lose, self._level = left, may_lose, level
        self._length = GrowingStretch()

    @property
    def steps(self) -> int:
        """So far."""
        return len(self._length)

    def add(self, ratio: float) -> None:
        """The next step took ``ratio`` times the usual."""
        self.left -= 1
        self._length.add(ratio)
        seems_lost = self._length.total / self._level - self.steps
        if self.steps > 1 and (seems_lost > self._may_lose or self._length.outliers > 1):
            self.left = 0


class _Lengths:
    """How long steps of each kind usually take when they are left alone."""

    def __init__(self) -> None:
        self.usual: dict[int, float] = {}
        """Seconds, of the kinds that are known."""
        self._first: dict[int, list[float]] = {}

    def knows(self, kind: int) -> bool:
        return kind in self.usual

    def meet(self, kind: int, seconds: float) -> None:
        """A step of a kind that is not known yet."""
        first = self._first.setdefault(kind, [])
        first.append(seconds)
        if len(first) == _FIRST_STEPS:
            self.usual[kind] = robust_mean(self._first.pop(kind))

    def learn(self, rest: list[TimedStep]) -> None:
        """These steps were left alone."""
        for kind in {step.kind for step in rest}:
            lengths = [step.seconds for step in rest if step.kind == kind]
            weight = len(lengths) / (len(lengths) + _OLD_STEPS)
            self.usual[kind] += weight * (robust_mean(lengths) - self.usual[kind])
