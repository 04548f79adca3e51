"""report.py: medians, paired ratios, and failures that stay visible."""

from io import StringIO
from typing import Any

import pytest
from report import Spread, summarize, table
from rich.console import Console


def _run(tpot: float, tokens: list[int], hits: int | None = None) -> dict[str, Any]:
    counters = {} if hits is None else {"hits": hits, "misses": 10, "loaded_bytes": 2**20, "stall_seconds": 0.5}
    totals = {} if hits is None else {"resident_bytes": 25, "expert_bytes": 100}
    return {
        "tpot": [tpot, tpot, 9.0],
        "ttft": 10 * tpot,
        "prompt_tokens": 100,
        "peak_bytes": int(1000 * tpot),
        "tokens": [tokens],
        "counters": counters,
        "totals": totals,
    }


def test_ratios_pair_the_runs_of_a_round_so_that_a_slower_machine_cancels_out() -> None:
    rounds = [
        {"plain": _run(1.0, [1]), "25%": _run(1.5, [1], 30)},
        {"plain": _run(4.0, [2]), "25%": _run(6.0, [2], 10)},
    ]
    ours = summarize(rounds, "plain")["25%"]
    assert ours["tpot_ratio"] == Spread(1.5, 1.5, 1.5)
    assert ours["prefill_ratio"].median == pytest.approx(1 / 1.5)
    assert ours["tpot"] == Spread(3.75, 1.5, 6.0)
    assert ours["prefill"].high == pytest.approx(100 / 15)
    assert ours["hit_rate"] == pytest.approx(40 / 60)
    assert ours["peak_bytes"] == 6000
    assert ours["same_tokens"] is True


def test_one_other_token_in_one_round_is_reported() -> None:
    rounds = [{"plain": _run(1.0, [1]), "25%": _run(1.0, [1], 1)}, {"plain": _run(1.0, [2]), "25%": _run(1.0, [3], 1)}]
    assert summarize(rounds, "plain")["25%"]["same_tokens"] is False


def test_without_a_baseline_there_are_no_ratios_and_failures_stay_in_the_table() -> None:
    summary = summarize([{"25%": _run(1.0, [1], 0)}], "plain")
    assert "tpot_ratio" not in summary["25%"]
    assert "plain" not in summary
    out = StringIO()
    Console(file=out, width=250).print(table("t", summary, {"25%": 2**31}, {"plain": "killed, out of memory"}))
    assert "FAILED: killed, out of memory" in out.getvalue()
    assert "2.00" in out.getvalue()
