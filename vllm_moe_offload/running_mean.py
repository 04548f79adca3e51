"""Running means of measurements."""

_WEIGHT = 0.05
"""Of the newest measurement."""


def blend(old: float, new: float) -> float:
    """A running mean ``old`` after the measurement ``new``."""
    return old + _WEIGHT * (new - old)
