"""How `bench` prints what it measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..bench.arms import Arm
from ..sizes import size_text

_COLUMNS = (
    "engine",
    "TPOT, ms",
    "x",
    "of it stalled, ms",
    "TTFT, ms",
    "hits",
    "experts in memory",
    "peak memory",
    "tokens",
)


def table(
    title: str,
    summary: Mapping[str, Any],
    arms: Sequence[Arm],
    load_peaks: Mapping[str, int],
    absent: Mapping[str, str],
) -> Table:
    """One row per arm, those that did not run with the reason. Medians of the rounds with (lowest-highest)."""
    found = Table(title=title, title_justify="left")
    for number, column in enumerate(_COLUMNS):
        found.add_column(column, justify="left" if number in (0, len(_COLUMNS) - 1) else "right")
    for arm in arms:
        if arm.name in summary:
            found.add_row(arm.name, *_cells(summary[arm.name], load_peaks[arm.name]))
        else:
            found.add_row(arm.name, absent.get(arm.name, "did not run"), *["-"] * (len(_COLUMNS) - 2))
    return found


def _cells(entry: Mapping[str, Any], load_peak: int) -> list[str]:
    offloads = "slot_bytes" in entry
    hits = entry.get("hit_rate")
    return [
        entry["tpot"].show(1e3),
        entry["tpot_ratio"].show() if "tpot_ratio" in entry else "-",
        entry["stall"].show(1e3) if offloads else "-",
        entry["ttft"].show(1e3, 0),
        "-" if hits is None else f"{hits:.1%}",
        f"{size_text(entry['slot_bytes'])} of {size_text(entry['expert_bytes'])}" if offloads else "all",
        size_text(max(entry["peak_bytes"], load_peak)),
        {None: "-", True: "same", False: "DIFFER"}[entry.get("same_tokens")],
    ]
