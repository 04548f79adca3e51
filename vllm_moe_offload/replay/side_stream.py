"""Guesses of a GPU: records that one stream loads after one another beside the main stream, over one link."""

from collections import deque
from dataclasses import dataclass


@dataclass
class _Guess:
    layer: int
    left: float
    """Seconds of the link, if it had the link for itself."""


class SideStream:
    """Loads for later layers, on a clock that moves when told to. Layers are given in ascending order.

    While the main stream loads too, both get half of the link: kernels that read host memory know no priority.
    """

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        """Of the link, for whichever stream."""
        self._guesses: deque[_Guess] = deque()

    @property
    def queue_seconds(self) -> float:
        """What is left of all guesses, if the main stream loads nothing."""
        return sum(guess.left for guess in self._guesses)

    def start(self, layer: int, seconds: float) -> None:
        """Load something for ``layer`` after what is queued."""
        self._guesses.append(_Guess(layer, seconds))
        self.busy_seconds += seconds

    def pass_time(self, seconds: float) -> None:
        """``seconds`` go by in which the main stream loads nothing."""
        while seconds > 0 and self._guesses:
            seconds -= self._advance(seconds)

    def demand(self, seconds: float) -> float:
        """The main stream loads what takes ``seconds`` alone; returns how long it takes beside the guesses."""
        self.busy_seconds += seconds
        shared = 0.0
        while shared < seconds and self._guesses:
            shared += self._advance(seconds - shared)
        return seconds + shared

    def join(self, layer: int) -> float:
        """The main stream waits for what was loaded for layers up to ``layer``; returns the seconds."""
        waited = 0.0
        while self._guesses and self._guesses[0].layer <= layer:
            waited += self._advance(self._guesses[0].left)
        return waited

    def _advance(self, most: float) -> float:
        """Go on with the first guess, for no longer than ``most``; returns the time."""
        seconds = min(most, self._guesses[0].left)
        self._guesses[0].left -= seconds
        if self._guesses[0].left <= 0:
            self._guesses.popleft()
        return seconds
