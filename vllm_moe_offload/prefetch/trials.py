"""Whether predicting is worth the time it takes: the planner weighs bytes, this compares whole steps by the clock.

Some steps are always left alone, and those that are predicted are judged by how they compare with these. What
prediction loses is paid from an allowance, a small share of all time; when that is used up it is silent until there is
enough for another trial. So it costs no more than the allowance in the long run, whatever the reason that it does not
pay: nothing is missing, guesses are wrong, or the link has no time to spare.
"""

from dataclasses import dataclass, field

SHARE = 0.01
"""Of all time: what predicting may lose."""
_TRIAL = 1.0
"""Steps' worth of time that a trial may lose."""
_MOST = 8.0
"""Steps' worth of gains that are remembered in its favour."""
_BLOCK = 8
"""Steps that are predicted, or left alone, in a row."""
_LONG_BLOCK = 56
"""Steps that are predicted in a row while there is no doubt."""
_MEMORY = 1 / 16
"""Weight of the newest step in a running mean."""
_SAVABLE = 1 / 3
"""Of the stalls, what prediction is counted on to save: with every step predicted it was a third to a half."""
_OUTLIER = 2.0
"""A step that took more than so many times the usual was held up by something else."""


@dataclass
class _Usual:
    """Running means over steps of about as many rows."""

    alone: float = 0.0
    """Seconds of a step that was left alone."""
    stalled: float = 0.0
    """Of these, seconds spent waiting for loads."""
    thinking: float = 0.0
    """Seconds of thinking in a step that was predicted."""
    steps_alone: int = 0
    predicting: bool = False
    left: int = 0
    """Steps left in the block."""

    def note_alone(self, seconds: float, stalled: float) -> None:
        if self.steps_alone:
            seconds = min(seconds, _OUTLIER * self.alone)
        self.steps_alone += 1
        weight = max(_MEMORY, 1 / self.steps_alone)
        self.alone += weight * (seconds - self.alone)
        self.stalled += weight * (stalled - self.stalled)

    def loss(self, seconds: float, thinking: float) -> float:
        """What predicting has cost a step, below zero where it has gained."""
        self.thinking += _MEMORY * (thinking - self.thinking)
        if self.steps_alone < _BLOCK // 2:
            return thinking
        return thinking + min(seconds - thinking - self.alone, _OUTLIER * self.alone)

    def is_hopeless(self) -> bool:
        """Whether thinking takes longer than the stalls it can be counted on to save."""
        return self.steps_alone >= _BLOCK // 2 and _SAVABLE * self.stalled < self.thinking


@dataclass
class Trials:
    """Says which steps to predict, and is told how long they took."""

    is_silent: bool = False
    """Nothing is predicted, because it has not paid."""
    _allowance: float | None = None
    """Seconds."""
    _usual: dict[int, _Usual] = field(default_factory=dict)

    def begin_step(self, rows: int) -> bool:
        """A step over so many rows starts: whether to predict in it."""
        usual = self._of(rows)
        if self.is_silent:
            return False
        if not usual.left:
            usual.predicting = not usual.predicting
            sure = self._allowance is not None and self._allowance >= _MOST / 2 * usual.alone
            usual.left = _LONG_BLOCK if usual.predicting and sure else _BLOCK
        usual.left -= 1
        return usual.predicting and not usual.is_hopeless()

    def end_step(self, rows: int, seconds: float, stalled: float, thinking: float | None) -> None:
        """A step over ``rows`` is over.

        Args:
            seconds: it took, all in all.
            stalled: of these, waiting for loads.
            thinking: of these, predicting; None where the step was left alone.
        """
        usual = self._of(rows)
        if self._allowance is None:
            self._allowance = _TRIAL * seconds
        self._allowance += SHARE * seconds
        if thinking is None:
            usual.note_alone(seconds, stalled)
        else:
            self._allowance -= usual.loss(seconds, thinking)
        step = usual.alone or seconds
        self._allowance = min(self._allowance, _MOST * step)
        if self._allowance < 0:
            self.is_silent = True
        elif self._allowance >= _TRIAL * step:
            self.is_silent = False

    def _of(self, rows: int) -> _Usual:
        return self._usual.setdefault(rows.bit_length(), _Usual())
