"""What the package logs while a test runs, as a list that grows."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "vllm_moe_offload"


class LogLines(logging.Handler):
    """Messages of loggers whose names contain ``within``, in order."""

    def __init__(self, within: str = "") -> None:
        super().__init__()
        self.lines: list[str] = []
        self._within = within

    def emit(self, record: logging.LogRecord) -> None:
        if self._within in record.name:
            self.lines.append(record.getMessage())

    def attach(self) -> list[str]:
        """Collect from now on, from INFO on. Returns the list."""
        logger = logging.getLogger(PACKAGE)
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self.lines

    def detach(self) -> None:
        logging.getLogger(PACKAGE).removeHandler(self)


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The messages of the package from INFO on."""
    handler = LogLines()
    try:
        yield handler.attach()
    finally:
        handler.detach()
