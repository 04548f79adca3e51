"""agreement.py: the warm-up is left out of what is simulated, and what is measured is a mean."""

from pathlib import Path

import pytest
from agreement import measured, simulate

from vllm_moe_offload.replay.bounds import perfect_forecast
from vllm_moe_offload.replay.hardware import HardwareProfile, ModelProfile
from vllm_moe_offload.trace.trace_file import read_trace

TRACE = Path(__file__).parents[2] / "examples" / "traces" / "gpt-oss-20b-small.npz"
MODEL = ModelProfile(1 << 20, 0, 1 << 19)
DISK = HardwareProfile("disk", 1e9, 1e-4, 1e10, 1e12, 1e-3, loads_at_once=5, step_overhead_seconds=1e-2, model=MODEL)


def test_the_warm_up_counts_as_little_in_the_simulation_as_in_the_measurement() -> None:
    trace = read_trace(TRACE).select([0, 1, 2])
    twice = trace.select([0, 0])
    everything_fits = simulate(twice, trace.num_layers * trace.num_experts, None, DISK, 1)
    assert everything_fits.hit_rate == 1 and everything_fits.stall == 0
    assert everything_fits.tpot == pytest.approx(1e-2 + trace.num_layers * (1e-3 + 4 * (1 << 20) / 1e10))
    bounded = simulate(trace, 192, None, DISK, 1)
    assert bounded.tpot == pytest.approx(everything_fits.tpot + bounded.stall) and 0 < bounded.hit_rate < 1
    informed = simulate(trace, 192, perfect_forecast(trace, (1, 2, 3)), DISK, 1)
    assert informed.stall < bounded.stall and informed.useful > 0


def test_means_are_measured() -> None:
    counters = {"hits": 8, "misses": 2, "steps": 4, "stall_seconds": 2.0}
    guesses = {"prefetch_useful": 3, "prefetch_late": 2, "prefetch_wasted": 1}
    runs = [{"tpot": [tpot], "decode_counters": counters, "counters": guesses} for tpot in (1.0, 1.0, 4.0)]
    entry = measured(runs)
    assert entry["tpot"] == 2 and entry["stall"] == 0.5 and entry["hit_rate"] == 0.8
    assert (entry["useful"], entry["late"], entry["wasted"]) == (9, 6, 3)
