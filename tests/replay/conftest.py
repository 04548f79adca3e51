from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

EXAMPLE = Path(__file__).parents[2] / "examples" / "traces" / "gpt-oss-20b-small.npz"


@pytest.fixture(scope="session")
def example() -> Trace:
    """Ten requests of gpt-oss-20b."""
    return read_trace(EXAMPLE)


@pytest.fixture(scope="session")
def short(example) -> Trace:
    """16 tokens of each of three requests."""
    trace = example.select([0, 4, 8])
    rows = np.concatenate([np.arange(start, start + 16) for start in trace.offsets[:-1]])
    return replace(
        trace,
        experts=trace.experts[rows],
        weights=trace.weights[rows],
        tokens=trace.tokens[rows],
        offsets=np.array([0, 16, 32, 48]),
    )
