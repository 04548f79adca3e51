"""A vLLM internal that we lean on: how to find it, what would be wrong with it, and how it is wrapped."""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seam:
    """``module.path`` is ours to lean on as long as it exists and takes ``parameters``."""

    module: str
    path: str
    purpose: str
    parameters: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """Attributes that its code sets or reads."""
    feature: str | None = None
    """What alone is lost where this seam has moved; None: offloading as a whole."""

    def resolve(self) -> Any:
        """The object itself.

        Raises:
            ImportError, AttributeError: it is not there.
        """
        target = importlib.import_module(self.module)
        return functools.reduce(getattr, self.path.split("."), target)

    def problem(self) -> str | None:
        """What is wrong with this seam in the installed vLLM, or None."""
        try:
            target = self.resolve()
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.path} is gone ({error})"
        except RuntimeError as error:
            return f"{self.module} cannot be imported ({error})"
        if self.parameters:
            missing = [name for name in self.parameters if name not in inspect.signature(target).parameters]
            if missing:
                return f"{self.module}.{self.path} no longer takes {', '.join(missing)}"
        if unknown := [name for name in self.names if name not in inspect.unwrap(target).__code__.co_names]:
            return f"{self.module}.{self.path} no longer knows {', '.join(unknown)}"
        return None

    def wrap(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the function by ``make(function)``, once. Static and class methods stay what they are.

        The seam of a feature is left alone where it has moved: the engine serves without the feature.
        """
        if self.feature is not None and self.problem() is not None:
            return
        *owner_path, name = self.path.split(".")
        owner = functools.reduce(getattr, owner_path, importlib.import_module(self.module))
        found = inspect.getattr_static(owner, name)
        kind = type(found) if isinstance(found, staticmethod | classmethod) else None
        function = found.__func__ if kind else found
        if getattr(function, "_moe_offload", False):
            return
        wrapped = functools.wraps(function)(make(function))
        wrapped._moe_offload = True  # type: ignore[attr-defined]
        setattr(owner, name, kind(wrapped) if kind else wrapped)
