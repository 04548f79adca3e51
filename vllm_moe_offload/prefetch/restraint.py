"""How cautious one phase of prefetching is: more when it did not pay, up to a pause; less again as steps go by."""

from dataclasses import dataclass

_WINDOW = 64
"""Outcomes judged together."""
_MOST = 8.0
_RETRY_AFTER = 512
"""Steps of a pause, after which prefetching is tried again at the highest caution."""
_STEPS_PER_HALVING = 256
"""Steps without a judgement after which caution is halved: where nothing is admitted, nothing is judged.

Guesses of which fewer than ``_WINDOW`` end in so many steps cost little.
"""


@dataclass
class Restraint:
    """One phase's caution: a factor on costs; while ``off``, nothing is admitted.

    From any state, whatever the outcomes: after at most ``_RETRY_AFTER`` steps it is not off, and after
    ``3 * _STEPS_PER_HALVING`` steps more without a judgement, caution is 1.
    """

    caution: float = 1.0
    off: bool = False
    _saved: float = 0.0
    _spent: float = 0.0
    _outcomes: int = 0
    _steps: int = 0
    """Since the pause began, the latest judgement, or the latest halving."""

    def begin_step(self) -> None:
        """A step of this phase starts."""
        self._steps += 1
        if self.off and self._steps >= _RETRY_AFTER:
            self.off, self._steps = False, 0
        elif not self.off and self._steps >= _STEPS_PER_HALVING:
            self.caution, self._steps = max(1.0, self.caution / 2), 0

    def note(self, saved_seconds: float, spent_seconds: float) -> None:
        """One prefetch ended: stall it saved, and time its bytes took from other loads."""
        self._saved += saved_seconds
        self._spent += spent_seconds
        self._outcomes += 1
        if self._outcomes >= _WINDOW:
            self._judge()
            self._saved, self._spent, self._outcomes = 0.0, 0.0, 0

    def _judge(self) -> None:
        if self._saved > 2 * self._spent:
            self.caution = max(1.0, self.caution / 2)
        elif self._saved < self._spent:
            self.off |= self.caution >= _MOST
            self.caution = min(_MOST, self.caution * 2)
        self._steps = 0
