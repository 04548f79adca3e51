"""report.py: medians, paired ratios, and failures that stay visible."""

from io import StringIO
from typing import Any

import pytest
from report import table
from rich.console import Console

from vllm_moe_offload.bench.summary import Spread, summarize


def _run(tpot: float, tokens: list[int], hits: int | None = None) -> dict[str, Any]:
    counters = (
        {}
        if hits is None
        else {"hits": hits, "misses": 10, "loaded_bytes": 2**20, "stall_seconds": 0.5}
        | {
            "steps": 5,
            "prefetch_useful": 3,
            "prefetch_late": 2,
            "prefetch_wasted": 1,
        }
    )
    totals = {} if hits is None else {"slot_bytes": 25, "expert_bytes": 100}
    return {
        "tpot": [tpot, tpot, 9.0],
        "ttft": 10 * tpot,
        "prompt_tokens": 100,
        "peak_bytes": int(1000 * tpot),
        "tokens": [tokens],
        "counters": counters,
        "decode_counters": counters,
        "totals": totals,
    }


def test_ratios_pair_the_runs_of_a_round_so_that_a_slower_machine_cancels_out() -> None:
    rounds = [
        {"plain": _run(1.0, [1]), "25%": _run(1.5, [1], 30)},
        {"plain": _run(4.0, [2]), "25%": _run(6.0, [2], 10)},
    ]
    ours = summarize(rounds, {"25%": "plain"})["25%"]
    assert ours["tpot_ratio"] == Spread(1.5, 1.5, 1.5)
    assert ours["prefill_ratio"].median == pytest.approx(1 / 1.5)
    assert ours["tpot"] == Spread(3.75, 1.5, 6.0)
    assert ours["prefill"].high == pytest.approx(100 / 15)
    assert ours["hit_rate"] == pytest.approx(40 / 60)
    assert ours["stall"] == Spread(0.1, 0.1, 0.1)
    assert ours["prefetch"] == {"useful": 6, "late": 4, "wasted": 2}
    assert ours["peak_bytes"] == 6000
    assert ours["same_tokens"] is True


def test_one_other_token_in_one_round_is_reported() -> None:
    rounds = [{"plain": _run(1.0, [1]), "25%": _run(1.0, [1], 1)}, {"plain": _run(1.0, [2]), "25%": _run(1.0, [3], 1)}]
    assert summarize(rounds, {"25%": "plain"})["25%"]["same_tokens"] is False


def test_without_a_baseline_there_are_no_ratios_and_failures_stay_in_the_table() -> None:
    summary = summarize([{"25%": _run(1.0, [1], 0)}], {"25%": "plain"})
    assert "tpot_ratio" not in summary["25%"]
    assert "plain" not in summary
    out = StringIO()
    Console(file=out, width=250).print(table("t", summary, {"25%": 2**31}, {"plain": "killed, out of memory"}))
    assert "FAILED: killed, out of memory" in out.getvalue()
    assert "2.00" in out.getvalue()


def test_each_arm_is_compared_with_its_own_reference() -> None:
    rounds = [{"25% none": _run(4.0, [1], 1), "25% history": _run(3.0, [1], 1), "50% none": _run(2.0, [1], 1)}]
    summary = summarize(rounds, {"25% none": "25% none", "25% history": "25% none", "50% none": "50% none"})
    assert summary["25% history"]["tpot_ratio"].median == 0.75
    assert summary["50% none"]["tpot_ratio"].median == 1
