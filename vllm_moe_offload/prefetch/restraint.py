"""How far a planner trusts itself: caution grows when prefetching did not pay, up to silence; then it tries again."""

from dataclasses import dataclass

_WINDOW = 64
"""Outcomes judged together."""
_MOST = 8.0
_RETRY_AFTER = 512
"""Steps of silence before prediction is tried again, at high caution."""


@dataclass
class Restraint:
    """One phase's caution: a factor on costs, infinite (``off``) while prediction does not pay."""

    caution: float = 1.0
    off: bool = False
    _saved: float = 0.0
    _spent: float = 0.0
    _outcomes: int = 0
    _silent_steps: int = 0

    def begin_step(self) -> None:
        """A step starts. Counts the silence."""
        if self.off:
            self._silent_steps += 1
            if self._silent_steps >= _RETRY_AFTER:
                self.off, self._silent_steps, self.caution = False, 0, _MOST

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
            self.off = self.caution >= _MOST
            self.caution = min(_MOST, self.caution * 2)
