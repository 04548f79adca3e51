"""From the rounds of a comparison to medians, ratios and a table. Pure: takes what was measured, adds nothing."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table


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


COLUMNS = (
    "engine",
    "TPOT ms",
    "ratio",
    "of it stalled, ms",
    "TTFT ms",
    "prefill ratio",
    "peak GiB",
    "loaded MiB per run",
    "hits",
    "useful / late / wasted",
    "tokens",
)


def table(
    title: str, summary: dict[str, dict[str, Any]], load_peaks: dict[str, int], failures: dict[str, str]
) -> Table:
    """One row per engine, failed ones with their reason; the peak includes loading. Medians with (low-high).

    Stalls and hits are of decoding; bytes and prefetches (useful, late and wasted ones) of prefill too.
    """
    result = Table(title=title)
    for column in COLUMNS:
        result.add_column(column, justify="left" if column in ("engine", "tokens") else "right")
    for name, entry in summary.items():
        offloads = "loaded_bytes" in entry
        rate = entry.get("hit_rate")
        same = entry.get("same_tokens")
        result.add_row(
            name,
            entry["tpot"].show(1e3),
            entry["tpot_ratio"].show(digits=3) if "tpot_ratio" in entry else "-",
            entry["stall"].show(1e3) if offloads else "-",
            entry["ttft"].show(1e3, 1),
            entry["prefill_ratio"].show(digits=3) if "prefill_ratio" in entry else "-",
            f"{max(entry['peak_bytes'], load_peaks.get(name, 0)) / 2**30:.2f}",
            entry["loaded_bytes"].show(2**-20, 1) if offloads else "-",
            f"{rate:.1%}" if rate is not None else ("no lookups" if offloads else "-"),
            " / ".join(map(str, entry["prefetch"].values())) if offloads else "-",
            {None: "-", True: "same", False: "DIFFER"}[same],
        )
    for name, reason in failures.items():
        result.add_row(name, f"FAILED: {reason}", *["-"] * (len(COLUMNS) - 2))
    return result
