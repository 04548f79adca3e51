"""The live page: what workers report, as JSON, and the files that show it in a browser.

It must never change anything, nor depend on who serves it: vLLM's server or the daemon.
"""

from .model import Model, models_of_reports
from .series import Observer, Series
from .site import DATA_PATH, HEADERS, PATH, Answer, Site

__all__ = ["DATA_PATH", "HEADERS", "PATH", "Answer", "Model", "Observer", "Series", "Site", "models_of_reports"]
