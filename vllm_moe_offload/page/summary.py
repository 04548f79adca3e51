"""What is going on, in a sentence, and what would make it better."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec
import numpy as np

from ..report import Prediction, WorkerReport
from ..sizes import size_text
from ..stats import Number
from .model import Model, Sample

SECONDS_LOOKED_AT = 60.0
STALE_SECONDS = 10.0
_MUCH_WAITING = 0.05
"""Share of the time from which waiting is worth doing something about."""
_ENOUGH_PREFETCHES = 100


class State(StrEnum):
    STARTING = "starting"
    IDLE = "idle"
    GOOD = "good"
    WAITING = "waiting"
    PROBLEM = "problem"


class Summary(msgspec.Struct):
    state: State
    sentence: str
    advice: list[str]
    """What would help, most helpful first; empty if nothing is known to."""


class Window(msgspec.Struct):
    """What was counted between two samples."""

    time: float
    """Seconds between them."""
    busy_seconds: float
    tokens: int
    hits: int
    misses: int
    stall_seconds: float
    loaded_bytes: int

    @classmethod
    def of(cls, samples: Sequence[Sample], seconds: float = SECONDS_LOOKED_AT) -> "Window | None":
        """Over the last ``seconds`` of ``samples``; None with fewer than two."""
        if len(samples) < 2:
            return None
        last = samples[-1]
        first = next(sample for sample in samples if sample.time >= last.time - seconds)
        if first is last:
            first = samples[-2]
        names = cls.__struct_fields__
        return cls(**{name: getattr(last, name) - getattr(first, name) for name in names})

    @property
    def hit_rate(self) -> float | None:
        uses = self.hits + self.misses
        return self.hits / uses if uses else None

    @property
    def waiting(self) -> float:
        """Share of the busy time."""
        return min(1.0, self.stall_seconds / self.busy_seconds) if self.busy_seconds else 0.0


def summarize(model: Model, samples: Sequence[Sample], now: float) -> Summary:
    """Of the last minute.

    Args:
        now: seconds since 1970.
    """
    totals = model.totals
    window = Window.of(samples)
    advice = _advice(model, totals, window)
    if not model.parallel:
        return Summary(State.IDLE, "No engine uses this model at present.", advice)
    if now - model.time > STALE_SECONDS:
        return Summary(State.PROBLEM, f"The workers have not reported for {now - model.time:.0f} s.", advice)
    if totals["failed_loads"] or totals["failed_threads"]:
        return Summary(State.PROBLEM, _failures(totals), advice)
    if window is None or not totals["hits"] + totals["misses"]:
        return Summary(State.STARTING, "No request has been served yet.", advice)
    rate = window.hit_rate
    if rate is None or not window.tokens:
        return Summary(State.IDLE, f"Idle: {_found(totals)} since the start.", advice)
    if totals["slots"] >= totals["experts"]:
        return Summary(State.GOOD, f"All {totals['experts']:,} experts are in memory: tokens do not wait.", advice)
    state = State.WAITING if window.waiting > _MUCH_WAITING else State.GOOD
    waited = (
        "tokens hardly waited" if window.waiting < 0.005 else f"tokens waited {percent(window.waiting)} of the time"
    )
    return Summary(state, f"{percent(rate)} of experts were found in memory; {waited}.", advice)


def percent(share: float) -> str:
    """``98 %``; 100 and 0 are said only of all and none."""
    digits = 0 if 0.01 <= share <= 0.99 or share in (0.0, 1.0) else 1
    number = min(max(100 * share, 0.1), 99.9) if digits else 100 * share
    return f"{number:.{digits}f}\N{NO-BREAK SPACE}%"


def _found(totals: Mapping[str, Number]) -> str:
    return f"{percent(totals['hits'] / (totals['hits'] + totals['misses']))} of experts were found in memory"


def _failures(totals: Mapping[str, Number]) -> str:
    parts = []
    if failed := totals["failed_loads"]:
        parts.append(f"{failed:,} experts could not be read, and requests that needed them failed")
    if threads := totals["failed_threads"]:
        parts.append(f"{threads} of the threads have ended by an error")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _advice(model: Model, totals: Mapping[str, Number], window: Window | None) -> list[str]:
    advice = []
    if totals["failed_loads"]:
        advice.append("Compare the store with its checksums: vllm-moe-offload store verify. The log names the record.")
    if totals["failed_threads"]:
        advice.append("The log has the error of the thread. Restart the engine.")
    if window and window.waiting > _MUCH_WAITING and totals["slots"] < totals["experts"]:
        advice.append(_larger_cache(model.reports, totals))
    started = totals["prefetches"]
    if started >= _ENOUGH_PREFETCHES and totals["prefetch_wasted"] > started / 2:
        advice.append(
            f"{percent(totals['prefetch_wasted'] / started)} of what was prefetched was not used. It improves as the "
            "history grows; if it does not, --moe-offload-predictor none leaves it out."
        )
    if window and totals["waves"] and window.waiting > _MUCH_WAITING:
        advice.append(
            "Steps needed more experts than there are slots and were computed in parts: a smaller "
            "--max-num-batched-tokens or a larger cache avoids that."
        )
    for report in model.reports:
        if report.prediction == Prediction.PAUSED:
            advice.append(f"Prediction is paused: {report.prediction_reason}.")
            break
    return advice


def _larger_cache(reports: Sequence[WorkerReport], totals: Mapping[str, Number]) -> str:
    """What twice the slots would hold, from how often experts were used."""
    slots, experts = int(totals["slots"]), int(totals["experts"])
    more = min(experts, 2 * slots)
    advice = f"A larger cache would help: --moe-offload-cache {100 * more / experts:.0f}%"
    size = size_text(totals["expert_bytes"] * more / experts)
    if more == experts:
        return f"{advice} holds all experts ({size} per worker)."
    now, then = (_covered(reports[0], count) if reports else None for count in (slots, more))
    if now is None or then is None:
        return f"{advice} takes {size} per worker."
    return (
        f"{advice} ({size} per worker) has room for the experts that took {percent(then)} of recent uses; "
        f"as many as fit now took {percent(now)} at most."
    )


def _covered(report: WorkerReport, count: int) -> float | None:
    """Share of all uses that the ``count`` experts take which are used most."""
    uses = np.sort(np.frombuffer(report.experts.uses, np.float32))[::-1]
    total = float(uses.sum(dtype=np.float64))
    return float(uses[:count].sum(dtype=np.float64)) / total if total else None
