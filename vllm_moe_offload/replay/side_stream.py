"""Speculative loads of a GPU: records that move in parts, each beside one layer, while nothing else is loaded."""

from dataclasses import dataclass


@dataclass
class _Load:
    part: float
    """Seconds of the link."""
    parts: int
    """Left to move."""


class SideStream:
    """Beside each layer one part of each load moves; the main stream waits for them before it looks at the next layer,
    so that they never share the link with what a layer demands."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        """Of the link, for whichever stream."""
        self._loads: list[_Load] = []
        self._moving = 0.0
        """Seconds that the parts beside the running layer still take."""

    def start(self, seconds: float, parts: int) -> None:
        """Load something in so many parts, the first beside the layer that runs next."""
        self._loads.append(_Load(seconds / parts, parts))
        self.busy_seconds += seconds

    def fork(self) -> None:
        """A layer has loaded what it lacked, and runs."""
        assert not self._moving, "the layer before has been waited for"
        for load in self._loads:
            self._moving += load.part
            load.parts -= 1
        self._loads = [load for load in self._loads if load.parts]

    def pass_time(self, seconds: float) -> None:
        """``seconds`` go by in which the main stream loads nothing."""
        self._moving = max(0.0, self._moving - seconds)

    def join(self) -> float:
        """The main stream waits for the parts beside the layer that has run; returns the seconds."""
        waited, self._moving = self._moving, 0.0
        return waited
