"""From the rounds of a comparison to medians and ratios. Pure: takes what was measured, adds nothing."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A median with the smallest and largest value it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`median (low-high)`, each times `scale`."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}-{self.high * scale:.{digits}f})"


def summarize(rounds: list[dict[str, dict[str, Any]]], references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Per variant, over rounds of `{variant: result of Engine.run}`; ratios pair the runs of each round.

    `tpot` and `ttft` in seconds, `prefill` in tokens per second. Ratios are to the variant that `references` names;
    they are missing where that has no result. A variant is summarized over the rounds it took part in, and left out if
    there are none.
    """
    summary = {}
    for name in dict.fromkeys(name for results in rounds for name in results):
        runs = [results[name] for results in rounds if name in results]
        other = references.get(name, "")
        pairs = [(results[name], results[other]) for results in rounds if name in results and other in results]
        entry: dict[str, Any] = {
            "rounds": len(runs),
            "tpot": Spread.of([tpot(run) for run in runs]),
            "ttft": Spread.of([run["ttft"] for run in runs]),
            "prefill": Spread.of([run["prompt_tokens"] / run["ttft"] for run in runs]),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
        }
        if pairs:
            entry["tpot_ratio"] = Spread.of([tpot(ours) / tpot(theirs) for ours, theirs in pairs])
            entry["prefill_ratio"] = Spread.of([theirs["ttft"] / ours["ttft"] for ours, theirs in pairs])
            entry["same_tokens"] = all(ours["tokens"] == theirs["tokens"] for ours, theirs in pairs)
        if runs[0]["counters"]:
            entry |= _counters(runs)
        summary[name] = entry
    return summary


def tpot(run: dict[str, Any]) -> float:
    """Seconds per output token of a run: the median over its requests."""
    return median(run["tpot"])


def stall(run: dict[str, Any]) -> float:
    """Seconds per output token that a run stalled while it decoded: the part of its TPOT that loads are to blame for.

    Of one request in a batch: all requests of a step wait together.
    """
    counters = run["decode_counters"]
    return counters["stall_seconds"] / max(1, counters["steps"])


def hit_rate(runs: Sequence[dict[str, Any]]) -> float | None:
    """Share of the experts needed in decoding that were in a slot; None where nothing was looked up."""
    hits, misses = (sum(run["decode_counters"][key] for run in runs) for key in ("hits", "misses"))
    return hits / (hits + misses) if hits + misses else None


def _counters(runs: list[dict[str, Any]]) -> dict[str, Any]:
    prefetches = {key: sum(run["counters"][f"prefetch_{key}"] for run in runs) for key in ("useful", "late", "wasted")}
    return {
        "hit_rate": hit_rate(runs),
        "loaded_bytes": Spread.of([run["counters"]["loaded_bytes"] for run in runs]),
        "stall": Spread.of([stall(run) for run in runs]),
        "prefetch": prefetches,
        "slot_bytes": runs[-1]["totals"]["slot_bytes"],
        "expert_bytes": runs[-1]["totals"]["expert_bytes"],
    }


def plain_data(value: Any) -> Any:
    """Named tuples as dicts, however deep."""
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain_data(value._asdict())
    return [plain_data(item) for item in value] if isinstance(value, list) else value
