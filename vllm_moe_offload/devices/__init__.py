"""Memory that slots live in, one module per kind of device. It must never decide what goes where."""

from .host import HostPool

__all__ = ["HostPool"]
