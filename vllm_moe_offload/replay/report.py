"""One replay from start to end, as plain data ready to print: what ``vllm-moe-offload replay`` reports."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy, create_policy
from ..errors import ConfigError, TraceError
from ..predict.base import ModelShape, Predictor
from ..predict.registry import predictor_for_replay
from ..trace.history import HistoryStore
from ..trace.trace import Trace
from ..windows.speculation import DISTANCE
from .accuracy import Accuracy
from .bounds import access_sequence, belady_miss_rate, lru_per_layer_miss_rate, perfect_forecast
from .device_report import on_device
from .forecast import Forecast, forecast
from .hardware import HardwareProfile, ModelProfile
from .parallel import Progress, run_all, unseen
from .replay_cache import Tally
from .schedule import steps
from .simulate import simulate
from .timeline import Timeline, TimelineReport

THRESHOLDS = (0.95, 0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1)
DISTANCES = (1, 2)
"""Layers ahead at which loads are admitted; nearer predictions are better, farther ones have more time."""


@dataclass(frozen=True)
class Setup:
    """What to replay with. ``slots`` is a number of slots; see ``parse_slots``."""

    slots: int
    policy: str = "lfu"
    predictor: str = "history"
    batch: int = 1
    threshold: float = 0.5
    frontier_tokens: int = 6_000
    hardware: HardwareProfile | None = None
    model: ModelProfile | None = None


def parse_slots(text: str, trace: Trace) -> int:
    """Slots from ``"192"`` or, as a share of all experts, from ``"25%"``.

    Raises:
        ConfigError: the text is neither, or does not come to at least one slot and at most one per expert.
    """
    total = trace.num_layers * trace.num_experts
    try:
        slots = round(total * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"slots: {text!r} is neither a number like 192 nor a share like 25%") from None
    if not 0 < slots <= total:
        raise ConfigError(f"slots: {text!r} comes to {slots} of this trace's {total} experts; choose 1 to {total}")
    return slots


def prepare_predictor(name: str, trace: Trace, history: Trace | None) -> Predictor:
    """Fit the predictor called ``name`` for replaying ``trace``; without a history it learns as it goes.

    Raises:
        TraceError: the history is of another model shape, or its embeddings were made by another function.
        ConfigError: there is no such predictor.
    """
    shape = ModelShape(*trace.shape)
    store = HistoryStore(shape)
    if history is not None:
        if history.shape != trace.shape:
            raise TraceError(f"history has {_words(history)}, the trace has {_words(trace)}; they must be of one model")
        widths = [one.embeddings.shape[1] for one in (history, trace) if one.embeddings is not None]
        if len(set(widths)) > 1:
            raise TraceError(
                f"embeddings of the history have {widths[0]} numbers, the trace's {widths[1]}; one function "
                "must have made both"
            )
        store.extend(history.requests())
    return predictor_for_replay(name, shape, store)


def forecast_trace(
    predictor: Predictor, trace: Trace, distances: Sequence[int] = DISTANCES
) -> tuple[Forecast, Accuracy]:
    """The predictor's forecast of a trace, and how good it was."""
    accuracy = Accuracy(trace.num_layers, trace.top_k)
    return forecast(predictor, trace, distances, accuracy), accuracy


def replay(trace: Trace, setup: Setup, history: Trace | None = None, progress: Progress = unseen) -> dict[str, Any]:
    """Replay ``trace`` and report it; the keys are described in docs/prediction.md.

    The frontier, the perfect-prediction bound and the timeline are replayed on a sample of whole requests,
    ``frontier_tokens`` long.

    Raises:
        ConfigError, TraceError: as ``prepare_predictor``, and as ``check``.
    """
    sequence = check(trace, setup)
    far = _speculative_distance(trace, setup)
    distances = sorted({*DISTANCES, *far})
    seen, accuracy = forecast_trace(prepare_predictor(setup.predictor, trace, history), trace, distances)
    prediction = seen.at(*DISTANCES)
    sample = spread_requests(trace, setup.frontier_tokens)
    few, few_prediction = trace.select(sample), prediction.select(trace, sample)
    thresholds = () if setup.predictor == "none" else THRESHOLDS
    jobs = [
        partial(run_once, trace, setup, None if setup.predictor == "none" else prediction, setup.threshold),
        partial(run_once, trace, setup, None, 1.0),
        partial(run_once, few, setup, perfect_forecast(few, DISTANCES), 0.5),
        *(partial(run_once, few, setup, few_prediction, threshold) for threshold in thresholds),
    ]
    chosen, without, perfect, *points = run_all(jobs, progress)
    few_sequence = access_sequence(few, _schedule(few, setup))
    report: dict[str, Any] = {
        "trace": _words(trace),
        "requests": trace.num_requests,
        "tokens": trace.num_tokens,
        "slots": setup.slots,
        "policy": setup.policy,
        "predictor": setup.predictor,
        "batch": setup.batch,
        "threshold": setup.threshold,
        "accesses": chosen.accesses,
        **_rates(chosen),
        "prefetch": {"useful": chosen.useful, "late": chosen.late, "wasted": chosen.wasted},
        "recall": accuracy.to_json(),
        "calibration_error": {str(d): accuracy.calibration_error(d) for d in accuracy.distances},
        "calibration": accuracy.calibration_to_json(),
        "no_prefetch": _rates(without),
        "belady_miss_rate": belady_miss_rate(sequence, setup.slots),
        "lru_per_layer_miss_rate": lru_per_layer_miss_rate(sequence, setup.slots, trace.num_layers),
        "perfect_prediction": _rates(perfect),
        "frontier": [{"threshold": t} | _rates(tally) for t, tally in zip(thresholds, points, strict=True)],
        "frontier_tokens": few.num_tokens,
        "frontier_lru_per_layer_miss_rate": lru_per_layer_miss_rate(few_sequence, setup.slots, trace.num_layers),
    }
    if setup.hardware is None:
        return report
    assert setup.model is not None
    if setup.hardware.manager is None:
        return report | on_hardware(few, setup, None if setup.predictor == "none" else few_prediction)
    speculation = seen.at(*far).select(trace, sample) if far and setup.predictor != "none" else None
    return report | on_device(few, _schedule(few, setup), setup.slots, setup.hardware, setup.model, speculation)


def check(trace: Trace, setup: Setup) -> list[list[int]]:
    """What is read together, in order (see ``access_sequence``), of a trace that can be replayed with ``setup``.

    Raises:
        TraceError: there is nothing to replay.
        ConfigError: the policy is unknown, the threshold is no probability, or the slots cannot hold the experts of one
            layer of one step.
    """
    _policy(trace, setup)
    if not trace.num_tokens:
        raise TraceError("the trace has no tokens to replay")
    if not 0 <= setup.threshold <= 1:
        raise ConfigError(f"threshold: {setup.threshold} is not a probability; choose 0 to 1")
    sequence = access_sequence(trace, _schedule(trace, setup))
    widest = max(map(len, sequence))
    if setup.slots < widest:
        raise ConfigError(
            f"slots: {setup.slots} are too few, a layer of one step of this trace reads {widest} experts; give at "
            f"least {widest} slots{' or a smaller batch' if setup.batch > 1 else ''}"
        )
    return sequence


def spread_requests(trace: Trace, tokens: int) -> NDArray[np.int64]:
    """Requests spread evenly over the trace, with about ``tokens`` tokens in all; all requests if it has no more."""
    if trace.num_tokens <= tokens:
        return np.arange(trace.num_requests)
    count = max(1, trace.num_requests * tokens // trace.num_tokens)
    return np.unique(np.linspace(0, trace.num_requests - 1, count).round().astype(np.int64))


def run_once(trace: Trace, setup: Setup, prediction: Forecast | None, threshold: float) -> Tally:
    """One replay without hardware."""
    return simulate(trace, _schedule(trace, setup), setup.slots, _policy(trace, setup), prediction, threshold)


def on_hardware(trace: Trace, setup: Setup, prediction: Forecast | None) -> dict[str, Any]:
    """Stalls and time per token on ``setup.hardware``, with the planner deciding, and without prefetching beside it."""
    assert setup.hardware is not None and setup.model is not None
    arms = {"": prediction, "no_prefetch_": None}
    jobs = [partial(_run_timeline, trace, setup, arm) for arm in arms.values()]
    report: dict[str, Any] = {"hardware": asdict(setup.hardware)}
    for prefix, outcome in zip(arms, run_all(jobs), strict=True):
        report[f"{prefix}stall_seconds_per_token"] = outcome.stall_seconds_per_token
        report[f"{prefix}tpot_seconds"] = outcome.tpot_seconds
        if not prefix:
            tally = outcome.tally
            report["planned"] = _rates(tally) | {"useful": tally.useful, "late": tally.late, "wasted": tally.wasted}
    return report


def _run_timeline(trace: Trace, setup: Setup, prediction: Forecast | None) -> TimelineReport:
    assert setup.hardware is not None and setup.model is not None
    timeline = Timeline(trace, setup.slots, _policy(trace, setup), prediction, setup.hardware, setup.model)
    return timeline.run(_schedule(trace, setup))


def _speculative_distance(trace: Trace, setup: Setup) -> tuple[int, ...]:
    """The distance at which a GPU loads ahead; empty where there is none, or nothing so far ahead."""
    if setup.hardware is None or setup.hardware.manager is None or trace.num_layers <= DISTANCE:
        return ()
    return (DISTANCE,)


def _schedule(trace: Trace, setup: Setup) -> Iterable[NDArray[np.int64]]:
    return steps(trace, setup.batch)


def _policy(trace: Trace, setup: Setup) -> EvictionPolicy:
    return create_policy(setup.policy, np.repeat(np.arange(trace.num_layers), trace.num_experts))


def _rates(tally: Tally) -> dict[str, float]:
    return {"demand_miss_rate": tally.demand_miss_rate, "loads_per_use": tally.loads_per_use}


def _words(trace: Trace) -> str:
    name = trace.model or "unnamed model"
    return f"{name}, {trace.num_layers} layers of {trace.num_experts} experts, top-{trace.top_k}"
