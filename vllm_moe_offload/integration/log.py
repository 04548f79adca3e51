"""Passes on to vLLM's log what this package logs, under this plugin's name."""

import logging

from vllm.logger import init_logger

PACKAGE = __name__.partition(".")[0]
PREFIX = "moe-offload: "

logger = init_logger("vllm.moe_offload")


class VllmHandler(logging.Handler):
    """Hands every record to vLLM's loggers, whose handlers and formats are those that were configured for vLLM."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logger.isEnabledFor(record.levelno):
            return
        text = f"{PREFIX}{record.getMessage()}"
        logger.handle(logging.makeLogRecord(record.__dict__ | {"name": logger.name, "msg": text, "args": None}))


def log_through_vllm() -> None:
    """Let whatever this package logs appear in vLLM's log, from vLLM's level on. Idempotent."""
    ours = logging.getLogger(PACKAGE)
    ours.handlers = [VllmHandler()]
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
