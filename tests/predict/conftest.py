from pathlib import Path

import pytest

from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

EXAMPLE = Path(__file__).parents[2] / "examples" / "traces" / "gpt-oss-20b-small.npz"


@pytest.fixture(scope="session")
def example() -> Trace:
    """Ten requests of gpt-oss-20b, two of each of five groups."""
    return read_trace(EXAMPLE)


@pytest.fixture(scope="session")
def past(example) -> Trace:
    """The first request of each group."""
    return example.select(range(0, 10, 2))


@pytest.fixture(scope="session")
def unseen(example) -> Trace:
    """One other request."""
    return example.select([3])
