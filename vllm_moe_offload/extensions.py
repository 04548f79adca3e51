"""Code from outside of this package that a setting names as ``package.module:Name``.

It is imported only where the person who runs this process has named it, never because another process asked for it.
"""

import functools
import importlib
import re
from typing import Any, TypeVar

from .errors import ConfigError

_REFERENCE = re.compile(r"[\w.]+:[\w.]+")

Kind = TypeVar("Kind")


def is_reference(value: str) -> bool:
    """Whether ``value`` has the form ``package.module:Name``."""
    return _REFERENCE.fullmatch(value) is not None


def load_object(setting: str, reference: str) -> Any:
    """What ``reference`` names.

    Args:
        setting: for the errors, what the user gave it for.

    Raises:
        ConfigError: the module cannot be imported, or has nothing of that name.
    """
    module, _, name = reference.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        raise ConfigError(
            f"{setting} = {reference!r} cannot be imported ({type(error).__name__}: {error}); its module must be on "
            "the PYTHONPATH of this process and have a class or function of that name"
        ) from error


def load_class(setting: str, reference: str, base: type[Kind]) -> type[Kind]:
    """The class that ``reference`` names.

    Raises:
        ConfigError: as ``load_object``, or it is no class that derives from ``base``.
    """
    found = load_object(setting, reference)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{setting} = {reference!r} is no {base.__name__}; name a class that derives from "
            f"{base.__module__}.{base.__name__}"
        )
    return found


def failure(setting: str, reference: str, what: str, error: Exception, way_out: str) -> ConfigError:
    """The refusal of a class that was found but does not work."""
    return ConfigError(f"{setting} = {reference!r} {what} ({type(error).__name__}: {error}); {way_out}")
