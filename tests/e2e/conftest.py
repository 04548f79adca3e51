"""Engines for end-to-end tests: real vLLM with and without the plugin, each in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engines import EngineServer, PlainServer
from tests.e2e.served import OFFLOAD, Served, serve
from tests.models import NAMES, REFUSED, Checkpoint, build, unmet


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """Unmodified vLLM: the plugin is not even loaded."""
    server = PlainServer(tmp_path_factory.mktemp("plain") / "log")
    yield server
    server.close()


@pytest.fixture(scope="session")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """vLLM with the plugin installed; a job switches it on through ``additional_config``."""
    server = EngineServer(tmp_path_factory.mktemp("offloaded") / "log")
    yield server
    server.close()


@pytest.fixture(scope="session")
def served(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``vllm serve`` of the bundled model."""
    with serve(tiny_moe, tmp_path_factory.mktemp("served") / "log", *OFFLOAD) as server:
        yield server


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = build(request.param, tmp_path_factory.mktemp(request.param))
    if reason := unmet(made):
        pytest.skip(reason)
    if request.param in REFUSED:
        pytest.skip(f"{request.param}: moe-offload refuses it (tests/integration/test_refusals.py)")
    return made
