"""What the package logs appears in vLLM's log, under this plugin's name and from vLLM's level on."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.log_lines import PACKAGE
from vllm_moe_offload.integration import report
from vllm_moe_offload.integration.log import VllmHandler, log_through_vllm
from vllm_moe_offload.integration.log import logger as vllm_logger


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def shown() -> Iterator[list[logging.LogRecord]]:
    """What reaches the handlers of vLLM's loggers."""
    collector = Collector()
    vllm_logger.addHandler(collector)
    yield collector.records
    vllm_logger.removeHandler(collector)


@pytest.mark.parametrize(
    "logger", [logging.getLogger(f"{PACKAGE}.daemon.client"), report.logger], ids=lambda it: it.name
)
def test_a_record_keeps_its_place_and_level_and_gets_the_prefix(
    logger: logging.Logger, shown: list[logging.LogRecord]
) -> None:
    log_through_vllm()
    log_through_vllm()
    assert [type(handler) for handler in logging.getLogger(PACKAGE).handlers] == [VllmHandler]
    logger.warning("%d%% of %s", 25, "it")
    (record,) = shown
    assert record.getMessage() == "moe-offload: 25% of it" and record.levelname == "WARNING"
    assert record.name == "vllm.moe_offload" and record.filename == "test_log.py"


def test_the_level_is_that_of_vllm(shown: list[logging.LogRecord], monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm_logger, "level", logging.WARNING)
    vllm_logger.manager._clear_cache()  # type: ignore[attr-defined]
    log_through_vllm()
    logger = logging.getLogger(f"{PACKAGE}.store.root")
    logger.info("a detail")
    logger.error("a failure")
    assert [record.getMessage() for record in shown] == ["moe-offload: a failure"]
