"""What an engine can do without is switched off for good by the first exception, instead of ending the engine."""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Switch:
    """On until it is turned off.

    Args:
        report: called once, with what was raised and where.
    """

    def __init__(self, report: Callable[[str], None] = lambda reason: None):
        self._report = report
        self.off = False

    def turn_off(self, error: Exception) -> None:
        """``error`` was raised. Without effect when it is off already."""
        if self.off:
            return
        self.off = True
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        self._report(f"{type(error).__name__}: {error}{where}")

    def guard(self, act: Callable[..., None]) -> Callable[..., None]:
        """``act``, until it raises or something else has turned the switch off; after that, nothing."""

        def guarded(*args: Any) -> None:
            if self.off:
                return
            try:
                act(*args)
            except Exception as error:
                self.turn_off(error)

        return guarded


class Switched(Protocol):
    """A class with methods that are ``optional``."""

    switch: Switch


_Method = TypeVar("_Method", bound=Callable[..., Any])


def optional(method: _Method) -> _Method:
    """Makes a method of something ``Switched`` return None once its switch is off, and turn it off by an exception."""

    @functools.wraps(method)
    def run(self: Switched, *args: Any, **kwargs: Any) -> Any:
        if self.switch.off:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.switch.turn_off(error)
            return None

    return run  # type: ignore[return-value]
