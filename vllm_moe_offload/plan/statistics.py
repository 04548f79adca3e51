"""Whose routing a plan is made with: the user's own trace, or statistics of models that come with this package."""

from functools import cache
from importlib.resources import files
from math import log
from pathlib import Path

import msgspec
import numpy as np

from ..errors import TraceError
from ..replay.report import spread_requests
from ..trace.trace import Trace
from ..trace.trace_file import read_trace
from .routing import drawn

STATISTICS_FILE = "statistics.json"
_LAYER_STEPS = 12_000
_SINGLE_LAYER_STEPS = 8_000
_FEWEST_ROWS, _FEWEST_SINGLE_ROWS, _MOST_ROWS = 256, 128, 1024
"""Tokens of a trace that is drawn, or replayed of a longer one: as many as take seconds to replay."""
_FEWEST_TOKENS, _MOST_TOKENS = 24, 128
"""Of one request that is drawn."""
MOST_REQUESTS = 64
"""That run at a time in a replay; more are taken to be routed as so many."""


class RoutingStatistics(msgspec.Struct, frozen=True):
    """How one model routes; ``benchmarks/routing_statistics.py`` makes them from traces."""

    model: str
    model_type: str
    shape: tuple[int, int, int]
    requests: int
    tokens: int
    correlations: list[list[float]]
    """As ``routing.correlations`` gives them."""


class RoutingSource(msgspec.Struct, frozen=True):
    """What a plan's routing is."""

    kind: str
    """``trace``: the user's own. ``same model``: drawn by statistics of this model. ``other model``: of another."""
    name: str
    """A file, or the model the statistics are of."""
    requests: int
    """That were recorded."""
    tokens: int
    hit_rate_error: float
    """By how much hit rates were off where this could be compared with real traces; 0 for one's own."""

    @property
    def words(self) -> str:
        """For a person: whose routing, and how far off."""
        if self.kind == "trace":
            return f"your trace {self.name} ({self.requests} requests, {self.tokens} tokens)"
        points = f"{100 * self.hit_rate_error:.0f} points"
        if self.kind == "same model":
            return (
                f"drawn with bundled statistics of {self.name} ({self.requests} requests, {self.tokens} tokens); for "
                f"prompts like those, hit rates are within about {points}"
            )
        return (
            f"drawn with bundled statistics of {self.name}, another model: hit rates may be {points} off either way, "
            "and times with them; record a trace of your own requests and give it with --trace"
        )


_ERRORS = {"trace": 0.0, "same model": 0.04, "other model": 0.12}
"""Of hit rates: the most at 12.5 to 75 % of the experts, by ``benchmarks/routing_statistics.py``."""


@cache
def bundled() -> tuple[RoutingStatistics, ...]:
    """The statistics that come with this package."""
    content = files(__package__).joinpath(STATISTICS_FILE).read_bytes()
    return tuple(msgspec.json.decode(content, type=list[RoutingStatistics]))


def routing_for(shape: tuple[int, int, int], model_type: str, batch: int) -> tuple[Trace, RoutingSource]:
    """A trace for a model without a trace, enough for ``batch`` requests at a time.

    Args:
        shape: MoE layers, experts, experts per token.
    """
    nearest = min(bundled(), key=lambda known: _distance(known, shape, model_type))
    is_same = nearest.shape == shape and nearest.model_type == model_type
    kind = "same model" if is_same else "other model"
    requests = max(8, min(batch, MOST_REQUESTS))
    tokens = max(_FEWEST_TOKENS, min(_MOST_TOKENS, _rows(shape) // requests))
    trace = drawn(np.array(nearest.correlations), shape, requests, tokens)
    return trace, RoutingSource(kind, nearest.model, nearest.requests, nearest.tokens, _ERRORS[kind])


def single_stream(trace: Trace) -> Trace:
    """Fewer of its requests, which take as long to replay one at a time as all of them several at a time."""
    tokens = max(_FEWEST_SINGLE_ROWS, min(_MOST_ROWS, _SINGLE_LAYER_STEPS // trace.num_layers))
    return trace.select(spread_requests(trace, tokens))


def routing_of_trace(path: Path, shape: tuple[int, int, int], batch: int) -> tuple[Trace, RoutingSource]:
    """The user's own trace, or whole requests spread over it.

    Raises:
        TraceError: it cannot be read, is of another model, or has too few requests for ``batch`` at a time.
    """
    trace = read_trace(path)
    kept = trace.without_repetitive()
    if trace.shape != shape:
        raise TraceError(
            f"--trace {path}: is of a model with {_words(trace.shape)}; this one has {_words(shape)}: give a trace of "
            "this model, or none"
        )
    wanted = min(batch, MOST_REQUESTS)
    if kept.num_requests < wanted or not kept.num_tokens:
        raise TraceError(
            f"--trace {path}: holds {kept.num_requests} requests that are not repetitive, too few for {wanted} at a "
            "time; record more, or lower --concurrency"
        )
    sample = spread_requests(kept, 2 * _rows(shape))
    if len(sample) < wanted:
        sample = np.arange(wanted)
    return kept.select(sample), RoutingSource("trace", str(path), kept.num_requests, kept.num_tokens, _ERRORS["trace"])


def _rows(shape: tuple[int, int, int]) -> int:
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _LAYER_STEPS // shape[0]))


def _distance(known: RoutingStatistics, shape: tuple[int, int, int], model_type: str) -> float:
    """Between two models as far as routing is concerned: how many experts there are, and which share a token uses."""
    (layers, experts, top_k), (_, others, k) = shape, known.shape
    far = abs(log(experts / others)) + abs(log(top_k / experts * others / k))
    return far - 2 * (known.model_type == model_type) - (known.shape == (layers, experts, top_k))


def _words(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} MoE layers of {shape[1]} experts, top-{shape[2]}"
