"""Two engines, each with its half of the requests: how much better does each predict from what both have left?

    python benchmarks/shared_history.py TRACE.npz                       # halves of one trace, by kind of request
    python benchmarks/shared_history.py FIRST.npz SECOND.npz            # what two engines have recorded

Each engine has served `--requests` of its half; then it serves `--judged` tokens more, which are replayed: once with a
history of its own requests, once with the history of both engines. Nothing of the judged requests is in either.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.cache import create_policy
from vllm_moe_offload.predict.base import ModelShape, Predictor
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.neighbours import NeighboursPredictor
from vllm_moe_offload.replay.forecast import Forecast
from vllm_moe_offload.replay.hardware import hardware_profile, model_profile
from vllm_moe_offload.replay.parallel import run_all
from vllm_moe_offload.replay.report import Setup, forecast_trace, parse_slots, run_once, spread_requests
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.replay.timeline import Timeline, TimelineReport
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace, concat
from vllm_moe_offload.trace.trace_file import read_trace

PREDICTORS = ("neighbours", "history")
HISTORIES = ("own", "shared")
DISTANCE = 2


class Engine(NamedTuple):
    """What one engine served before, and what it serves now."""

    name: str
    past: Trace
    judged: Trace


class Outcome(NamedTuple):
    """What one engine got from one history."""

    engine: str
    predictor: str
    history: str
    requests: int
    tokens: int
    recall: float
    """Of the true experts among the top-k most probable, two layers ahead, mean over layers from the seventh on."""
    recall_from_start: float
    """The same from the step's start, over the first two layers."""
    misses: float
    """Demand misses per use, prefetching what is given more than the threshold."""
    stall_seconds: float
    """Per token, on the hardware, the planner deciding."""


def halves_by_kind(trace: Trace) -> list[Trace]:
    """Whole groups to either half, alternately from the largest on; requests in turn where no groups are known."""
    if trace.group is None:
        return [trace.select(np.arange(first, trace.num_requests, 2)) for first in (0, 1)]
    names, counts = np.unique(trace.group, return_counts=True)
    order = names[np.argsort(-counts, kind="stable")]
    return [trace.select(np.flatnonzero(np.isin(trace.group, order[first::2]))) for first in (0, 1)]


def halves_in_turn(trace: Trace) -> list[Trace]:
    """Every other request to either half: both serve everything."""
    return [trace.select(np.arange(first, trace.num_requests, 2)) for first in (0, 1)]


def engines_of(halves: list[Trace], requests: int, judged_tokens: int, seed: int) -> list[Engine]:
    """Requests of each half in random order: the first ones are past, as many of the last ones as needed are judged."""
    engines = []
    for name, half in zip("AB", halves, strict=True):
        order = np.random.default_rng(seed).permutation(half.num_requests)
        lengths = np.diff(half.offsets)[order[::-1]]
        judged = order[::-1][: 1 + int(np.searchsorted(np.cumsum(lengths), judged_tokens))]
        if requests + len(judged) > half.num_requests:
            raise SystemExit(
                f"engine {name} has {half.num_requests} requests: {requests} and {len(judged)} are too many"
            )
        engines.append(Engine(name, half.select(order[:requests]), half.select(judged)))
    return engines


def predictor_from(name: str, history: Trace) -> Predictor:
    """Ready to predict; what it is asked about later teaches its heads nothing."""
    shape = ModelShape(*history.shape)
    store = HistoryStore(shape)
    store.extend(history.requests())
    if name == "neighbours":
        return NeighboursPredictor(shape, store)
    predictor = HistoryPredictor(shape, store)
    predictor.learn_all()
    return predictor


def time_on_hardware(trace: Trace, setup: Setup, prediction: Forecast) -> TimelineReport:
    """One request after the other."""
    assert setup.hardware is not None and setup.model is not None
    policy = create_policy(setup.policy, np.repeat(np.arange(trace.num_layers), trace.num_experts))
    return Timeline(trace, setup.slots, policy, prediction, setup.hardware, setup.model).run(steps(trace, batch=1))


def judge(engine: Engine, predictor: str, kind: str, history: Trace, setup: Setup) -> Outcome:
    """Replay what the engine serves now."""
    prediction, accuracy = forecast_trace(predictor_from(predictor, history), engine.judged)
    top_k = engine.judged.top_k
    sample = spread_requests(engine.judged, setup.frontier_tokens)
    few, of_few = engine.judged.select(sample), prediction.select(engine.judged, sample)
    tally = run_once(few, setup, of_few, setup.threshold)
    timing = time_on_hardware(few, setup, of_few)
    return Outcome(
        engine.name,
        predictor,
        kind,
        history.num_requests,
        history.num_tokens,
        float(accuracy.recall(DISTANCE, top_k)[6:].mean()),
        float(accuracy.recall(0, top_k)[:2].mean()),
        tally.demand_miss_rate,
        timing.stall_seconds_per_token,
    )


def outcomes_of(engines: list[Engine], setup: Setup) -> Iterator[Outcome]:
    """Every engine with either history and either predictor."""
    shared = concat([engine.past for engine in engines], engines[0].past.shape)
    jobs = [
        partial(judge, engine, predictor, kind, engine.past if kind == "own" else shared, setup)
        for engine in engines
        for predictor in PREDICTORS
        for kind in HISTORIES
    ]
    yield from run_all(jobs)


def show(title: str, outcomes: list[Outcome]) -> Table:
    """A line for either history of each engine, and what sharing changed."""
    columns = (
        "engine",
        "predictor",
        "history",
        "requests",
        "tokens",
        "recall",
        "first layers",
        "misses",
        "stall/token",
    )
    table = Table(*columns, title=title, box=None)
    for own, shared in zip(outcomes[::2], outcomes[1::2], strict=True):
        for one in (own, shared):
            values = (f"{one.recall:.3f}", f"{one.recall_from_start:.3f}", f"{one.misses:.3f}")
            stall = f"{1e3 * one.stall_seconds:.2f} ms"
            table.add_row(*map(str, one[:5]), *values, stall)
        change = (
            f"{100 * (shared.recall - own.recall):+.1f} pt",
            f"{100 * (shared.recall_from_start - own.recall_from_start):+.1f} pt",
            f"{100 * (shared.misses / own.misses - 1):+.1f}%",
            f"{100 * (shared.stall_seconds / own.stall_seconds - 1):+.1f}%",
        )
        table.add_row("", "", "", "", "", *change, end_section=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, nargs="+", default=[10, 30, 100], help="of each engine's past")
    parser.add_argument("--judged", type=int, default=3000, help="tokens of each engine")
    parser.add_argument(
        "--simulated", type=int, default=1500, help="tokens of these whose misses and stalls are counted"
    )
    parser.add_argument("--split", choices=["kind", "turn"], default="kind", help="of one trace into halves")
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--hardware", default="rtx4090-pcie4")
    parser.add_argument("--record-bytes", type=int, help="of one expert, where the model is not known")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    traces = [read_trace(path).without_repetitive() for path in options.traces]
    halves = {"kind": halves_by_kind, "turn": halves_in_turn}[options.split](traces[0]) if len(traces) == 1 else traces
    setup = Setup(
        slots=parse_slots(options.slots, halves[0]),
        frontier_tokens=options.simulated,
        hardware=hardware_profile(options.hardware),
        model=model_profile(traces[0].model, options.record_bytes),
    )
    console, results = Console(width=140), {}
    for requests in options.requests:
        outcomes = list(outcomes_of(engines_of(halves, requests, options.judged, options.seed), setup))
        results[requests] = [outcome._asdict() for outcome in outcomes]
        console.print(show(f"{requests} requests each, split by {options.split}, {options.slots} slots", outcomes))
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), "results": results}, default=str, indent=1))


if __name__ == "__main__":
    main()
