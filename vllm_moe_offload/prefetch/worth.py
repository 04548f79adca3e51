"""Whether predicting is worth the time it takes to think: the planner weighs bytes, this weighs the thinking itself."""

_WINDOW = 32
"""Steps judged together."""
_FIRST_SILENCE = 64
_LONGEST_SILENCE = 1024


class Worth:
    """Compares the stalls that predictions saved with the time predicting took, and falls silent when it lost.

    Silence lasts twice as long every time, and ends with another window of trying.
    """

    def __init__(self) -> None:
        self._saved = 0.0
        self._spent = 0.0
        self._steps = 0
        self._silence = _FIRST_SILENCE
        self._silent_for = 0

    def begin_step(self) -> bool:
        """A step starts: whether to predict in it."""
        if self._silent_for > 0:
            self._silent_for -= 1
            return False
        self._steps += 1
        if self._steps > _WINDOW:
            self._judge()
        return self._silent_for == 0

    def save(self, seconds: float) -> None:
        """A stall was this much shorter."""
        self._saved += seconds

    def spend(self, seconds: float) -> None:
        """Predicting took this long."""
        self._spent += seconds

    def _judge(self) -> None:
        if self._saved > self._spent:
            self._silence = _FIRST_SILENCE
        else:
            self._silent_for = self._silence
            self._silence = min(_LONGEST_SILENCE, 2 * self._silence)
        self._saved = self._spent = 0.0
        self._steps = 1
