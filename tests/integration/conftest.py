"""vLLM's own argument parser and configuration, in this process, with the plugin loaded as vLLM loads it."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Parse = Callable[..., Any]


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of ``vllm serve``."""
    monkeypatch.delenv("VLLM_MOE_OFFLOAD", raising=False)
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def engine_args(parser: argparse.ArgumentParser, tiny_moe: Path) -> Parse:
    """Engine arguments as ``vllm serve`` gets them from a command line, to which the bundled model is added."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return lambda *words: AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_moe), *words]))


@pytest.fixture
def warnings_of_vllm(caplog: pytest.LogCaptureFixture) -> Any:
    """What vLLM's logger, which does not propagate, is told to warn of."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
