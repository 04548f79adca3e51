"""What every test session shares: no network, one core per worker, throw-away stores and caches.

Must stay free of vLLM and torch: most tests need neither.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.log_lines import PACKAGE, log_lines

_OWNER = "MOE_OFFLOAD_TEST_OWNER"


def _core_of_this_worker() -> str:
    """The core this pytest-xdist worker's engines compute on; the first one without xdist."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return str(cores[int(worker.removeprefix("gw")) % len(cores)])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="compile every model, not one of each kind")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports vLLM; workers share the controller's folder."""
    if "MOE_OFFLOAD_TEST_ROOT" not in os.environ:
        os.environ["MOE_OFFLOAD_TEST_ROOT"] = tempfile.mkdtemp(prefix="moe-offload-tests-")
        os.environ[_OWNER] = str(os.getpid())
    root = Path(os.environ["MOE_OFFLOAD_TEST_ROOT"])
    os.environ["VLLM_MOE_OFFLOAD_STORE_ROOT"] = str(root / "stores")
    # Engines under test must not find a daemon that happens to run here, nor be seen by readers of reports.
    os.environ["XDG_RUNTIME_DIR"] = str(root)
    os.environ["VLLM_MOE_OFFLOAD_REPORTS"] = str(root / "reports")
    # A compiled graph of an earlier session must not hide what today's code does.
    os.environ["VLLM_CACHE_ROOT"] = str(root / "vllm-cache")
    if "PYTEST_XDIST_WORKER" in os.environ or not hasattr(config.option, "dist") or config.option.dist == "no":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _core_of_this_worker())
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def pytest_unconfigure() -> None:
    """Remove the session's folder, in the process that made it."""
    if os.environ.get(_OWNER) == str(os.getpid()):
        shutil.rmtree(os.environ["MOE_OFFLOAD_TEST_ROOT"], ignore_errors=True)


@pytest.fixture(autouse=True)
def unconfigured_log() -> Iterator[None]:
    """The package's logger as it is before an engine or a command has configured it."""
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.INFO)
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the package logs while the test runs, from INFO on."""
    with log_lines() as lines:
        yield lines


@pytest.fixture
def silent(said: list[str]) -> Iterator[None]:
    """The test fails if the package logs anything, from INFO on."""
    yield
    assert not said


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The bundled model."""
    return Path(__file__).parent.parent / "examples" / "models" / "tiny-moe"
