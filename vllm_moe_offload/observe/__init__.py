"""Plain numbers about what happened. It must never influence what happens."""

from .counters import Counters
from .load_report import NOTHING, LoadReport

__all__ = ["NOTHING", "Counters", "LoadReport"]
