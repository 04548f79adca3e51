"""Where the log of a command goes: one line per record on stderr."""

import logging
from enum import StrEnum

PACKAGE = __name__.partition(".")[0]


class LogLevel(StrEnum):
    """Of a log line; a name of ``logging``."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def log_to_stderr(level: LogLevel) -> None:
    """Show what this package logs from ``level`` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [handler]
    logger.setLevel(level)
