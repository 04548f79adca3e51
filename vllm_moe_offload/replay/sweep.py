"""All policies and predictors over several cache sizes, with the bounds beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..cache import POLICY_NAMES
from ..errors import ConfigError
from ..predict.registry import REPLAY_PREDICTORS
from ..trace.trace import Trace
from .bounds import belady_miss_rate, lru_per_layer_miss_rate, perfect_forecast
from .forecast import Forecast
from .parallel import Progress, run_all, unseen
from .report import DISTANCES, Setup, check, forecast_trace, parse_slots, prepare_predictor, run_once, spread_requests

SWEEP_SLOTS = ("12.5%", "25%", "50%", "75%")
SWEEP_THRESHOLDS = (0.8, 0.5, 0.3, 0.1)
SWEEP_TOKENS = 1_000
BELADY = "belady"
LRU_PER_LAYER = "lru per layer"
PERFECT = "perfect"


class Point(NamedTuple):
    """One cell of the sweep."""

    slots: int
    policy: str
    """One of POLICY_NAMES or a class's; BELADY and LRU_PER_LAYER where nothing is prefetched and no policy is asked."""
    predictor: str
    """One of REPLAY_PREDICTORS or a class's, or PERFECT."""
    threshold: float
    demand_miss_rate: float
    loads_per_use: float


def sweep(
    trace: Trace,
    history: Trace | None,
    setup: Setup,
    policies: Sequence[str] = POLICY_NAMES,
    predictors: Sequence[str] = REPLAY_PREDICTORS,
    sizes: Sequence[str] = SWEEP_SLOTS,
    progress: Progress = unseen,
) -> Iterator[list[Point]]:
    """Replay every combination on a sample of whole requests, ``setup.frontier_tokens`` long.

    Yields the bounds that need no predictor first, then the points of one predictor after the other, PERFECT last.
    ``setup.slots`` and ``setup.policy`` are ignored. Sizes that cannot hold a step's experts are left out. ``progress``
    is of one predictor at a time.

    Raises:
        TraceError: as ``check``.
        ConfigError: no size can hold a step's experts.
    """
    trace = trace.select(spread_requests(trace, setup.frontier_tokens))
    for policy in policies:
        sequence = check(trace, replace(setup, policy=policy, slots=trace.num_layers * trace.num_experts))
    widest = max(map(len, sequence))
    all_slots = sorted({slots for text in sizes if (slots := parse_slots(text, trace)) >= widest})
    if not all_slots:
        raise ConfigError(
            f"slots: {', '.join(sizes)} are too few, a layer of one step of this trace reads {widest} experts; choose "
            "more slots or a smaller batch"
        )
    yield [bound for slots in all_slots for bound in _bounds(sequence, slots, trace.num_layers)]
    for name in (*predictors, PERFECT):
        prediction, thresholds = _what_to_try(name, trace, history)
        jobs: list[Callable[[], Point]] = [
            partial(_point, trace, replace(setup, slots=slots, policy=policy, predictor=name), prediction, threshold)
            for slots in all_slots
            for policy in policies
            for threshold in thresholds
        ]
        yield run_all(jobs, progress)


def best_at_bytes(points: Sequence[Point], loads_per_use: float) -> Point:
    """The point with the fewest misses of those that load no more; where all load more, the one that loads least."""
    affordable = [point for point in points if point.loads_per_use <= loads_per_use]
    if not affordable:
        return min(points, key=lambda point: point.loads_per_use)
    return min(affordable, key=lambda point: point.demand_miss_rate)


def _bounds(sequence: list[list[int]], slots: int, layers: int) -> list[Point]:
    best, plain = belady_miss_rate(sequence, slots), lru_per_layer_miss_rate(sequence, slots, layers)
    return [
        Point(slots, BELADY, "none", 1.0, best, best),
        Point(slots, LRU_PER_LAYER, "none", 1.0, plain, plain),
    ]


def _what_to_try(name: str, trace: Trace, history: Trace | None) -> tuple[Forecast | None, Sequence[float]]:
    if name == "none":
        return None, (1.0,)
    if name == PERFECT:
        return perfect_forecast(trace, DISTANCES), (0.5,)
    prediction, _ = forecast_trace(prepare_predictor(name, trace, history), trace)
    return prediction, SWEEP_THRESHOLDS


def _point(trace: Trace, cell: Setup, prediction: Forecast | None, threshold: float) -> Point:
    tally = run_once(trace, cell, prediction, threshold)
    return Point(cell.slots, cell.policy, cell.predictor, threshold, tally.demand_miss_rate, tally.loads_per_use)
