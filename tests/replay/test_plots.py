"""Pictures: equal results make equal files. Needs matplotlib, which only the extra ``plot`` installs."""

import pytest
from replay_traces import random_trace

from vllm_moe_offload.replay.plot import plot_report, plot_sweep, require_plotting
from vllm_moe_offload.replay.report import Setup, replay
from vllm_moe_offload.replay.sweep import sweep

pytest.importorskip("matplotlib")
TRACE = random_trace(3, 8, 2, lengths=(6, 5))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_results_make_equal_pictures(tmp_path, suffix):
    report = replay(TRACE, Setup(slots=16, predictor="frequency"))
    points = [point for part in sweep(TRACE, None, Setup(slots=16), predictors=("none", "frequency")) for point in part]
    for name in ("one", "two"):
        require_plotting(tmp_path / f"{name}{suffix}")
        plot_report(report, tmp_path / f"{name}{suffix}")
        plot_sweep(points, tmp_path / f"{name}-sweep{suffix}", "a model")
    for kind in ("", "-sweep"):
        first = (tmp_path / f"one{kind}{suffix}").read_bytes()
        assert first == (tmp_path / f"two{kind}{suffix}").read_bytes() and len(first) > 1000
