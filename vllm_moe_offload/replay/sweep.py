"""All policies and predictors over several cache sizes, with the bounds beside them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..cache import POLICY_NAMES
from ..history.trace import Trace
from ..predict.fitting import PREDICTOR_NAMES
from .bounds import access_sequence, belady_miss_rate, lru_per_layer_miss_rate, perfect_forecast
from .forecast import Forecast
from .parallel import run_all
from .report import DISTANCES, Setup, forecast_trace, parse_slots, prepare_predictor, run_once, spread_requests
from .schedule import steps

SWEEP_SLOTS = ("12.5%", "25%", "50%", "75%")
SWEEP_THRESHOLDS = (0.7, 0.5, 0.3, 0.1)


class Point(NamedTuple):
    """One cell of the sweep."""

    slots: int
    policy: str
    predictor: str
    threshold: float
    demand_miss_rate: float
    loads_per_use: float


def sweep(
    trace: Trace,
    history: Trace | None,
    setup: Setup,
    policies: Sequence[str] = POLICY_NAMES,
    predictors: Sequence[str] = PREDICTOR_NAMES,
) -> list[Point]:
    """Replay every combination on a sample of ``setup.frontier_tokens`` tokens.

    Bounds are points too: policies ``belady`` and ``lru per layer``, predictor ``perfect``.
    """
    trace = trace.select(spread_requests(trace, setup.frontier_tokens))
    points: list[Point] = []
    all_slots = [parse_slots(text, trace) for text in SWEEP_SLOTS]
    sequence = access_sequence(trace, steps(trace, setup.batch))
    for slots in all_slots:
        best = belady_miss_rate(sequence, slots)
        plain = lru_per_layer_miss_rate(sequence, slots, trace.num_layers)
        points += [
            Point(slots, "belady", "none", 1.0, best, best),
            Point(slots, "lru per layer", "none", 1.0, plain, plain),
        ]
    for name in (*predictors, "perfect"):
        if name == "perfect":
            prediction = perfect_forecast(trace, DISTANCES)
        else:
            prediction, _ = forecast_trace(prepare_predictor(name, trace, history), trace)
        thresholds = (0.5,) if name == "perfect" else (1.0,) if name == "none" else SWEEP_THRESHOLDS
        jobs: list[Callable[[], Point]] = []
        for slots in all_slots:
            for policy in policies:
                cell = replace(setup, slots=slots, policy=policy, predictor=name)
                jobs += [partial(_point, trace, cell, prediction, threshold) for threshold in thresholds]
        points += run_all(jobs)
    return points


def _point(trace: Trace, cell: Setup, prediction: Forecast, threshold: float) -> Point:
    tally = run_once(trace, cell, prediction, threshold)
    return Point(cell.slots, cell.policy, cell.predictor, threshold, tally.demand_miss_rate, tally.loads_per_use)
