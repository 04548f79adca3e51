"""The table of a comparison. Pure: takes what was measured, adds nothing."""

from typing import Any

from rich.table import Table

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
