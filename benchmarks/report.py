"""From the rounds of a comparison to medians, ratios and a table. Pure: takes what was measured, adds nothing."""

from collections.abc import Sequence
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


def summarize(rounds: list[dict[str, dict[str, Any]]], baseline: str) -> dict[str, dict[str, Any]]:
    """Per variant, over rounds of `{variant: result of Engine.run}`; ratios pair each round with its own baseline run.

    `tpot` and `ttft` in seconds, `prefill` in tokens per second. Ratios are missing where `baseline` has no result.
    A variant is summarized over the rounds it took part in, and left out if there are none.
    """
    summary = {}
    for name in dict.fromkeys(name for results in rounds for name in results):
        runs = [results[name] for results in rounds if name in results]
        pairs = [(results[name], results[baseline]) for results in rounds if name in results and baseline in results]
        entry: dict[str, Any] = {
            "rounds": len(runs),
            "tpot": Spread.of([_tpot(run) for run in runs]),
            "ttft": Spread.of([run["ttft"] for run in runs]),
            "prefill": Spread.of([run["prompt_tokens"] / run["ttft"] for run in runs]),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
        }
        if pairs:
            entry["tpot_ratio"] = Spread.of([_tpot(ours) / _tpot(plain) for ours, plain in pairs])
            entry["prefill_ratio"] = Spread.of([plain["ttft"] / ours["ttft"] for ours, plain in pairs])
            entry["same_tokens"] = all(ours["tokens"] == plain["tokens"] for ours, plain in pairs)
        if runs[0]["counters"]:
            entry |= _counters(runs)
        summary[name] = entry
    return summary


def _tpot(run: dict[str, Any]) -> float:
    return median(run["tpot"])


def _counters(runs: list[dict[str, Any]]) -> dict[str, Any]:
    hits = sum(run["counters"]["hits"] for run in runs)
    misses = sum(run["counters"]["misses"] for run in runs)
    return {
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "loaded_bytes": Spread.of([run["counters"]["loaded_bytes"] for run in runs]),
        "stall_seconds": Spread.of([run["counters"]["stall_seconds"] for run in runs]),
        "resident_bytes": runs[-1]["totals"]["resident_bytes"],
        "expert_bytes": runs[-1]["totals"]["expert_bytes"],
    }


COLUMNS = (
    "engine",
    "TPOT ms",
    "x plain",
    "TTFT ms",
    "prefill x plain",
    "peak GiB",
    "loaded MiB per run",
    "stall s per run",
    "hits",
    "tokens",
)


def table(
    title: str, summary: dict[str, dict[str, Any]], load_peaks: dict[str, int], failures: dict[str, str]
) -> Table:
    """One row per engine, failed ones with their reason; the peak includes loading. Medians with (low-high)."""
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
            entry["ttft"].show(1e3, 1),
            entry["prefill_ratio"].show(digits=3) if "prefill_ratio" in entry else "-",
            f"{max(entry['peak_bytes'], load_peaks.get(name, 0)) / 2**30:.2f}",
            entry["loaded_bytes"].show(2**-20, 1) if offloads else "-",
            entry["stall_seconds"].show(digits=3) if offloads else "-",
            f"{rate:.1%}" if rate is not None else ("no lookups" if offloads else "-"),
            {None: "-", True: "as plain", False: "DIFFER"}[same],
        )
    for name, reason in failures.items():
        result.add_row(name, f"FAILED: {reason}", *["-"] * (len(COLUMNS) - 2))
    return result
