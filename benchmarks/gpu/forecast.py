"""What the replay forecasts for an engine of `compare.py`, from what was measured beside it: its layers, its link."""

import json
from pathlib import Path

from vllm_moe_offload.replay.device_timeline import DeviceTimeline
from vllm_moe_offload.replay.hardware import HardwareProfile, ManagerCosts, ModelProfile
from vllm_moe_offload.replay.report import parse_slots
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

_UNBOUNDED = 1e18
_LATENCY = 3e-6


def measured_profile(plain_tpot: float, layers: int, rates: Path, manager: Path) -> HardwareProfile | None:
    """The GPU as measured: a layer takes its share of a token of plain vLLM; None where its link was not measured."""
    if not rates.is_file():
        return None
    gather = json.loads(rates.read_text()).get("gather")
    if not gather:
        return None
    costs = ManagerCosts()
    if manager.is_file():
        by_case = [case["hit_us_per_layer"] for case in json.loads(manager.read_text())]
        costs = ManagerCosts(device_seconds=1e-6 * max(by_case))
    overhead = plain_tpot / layers
    return HardwareProfile("measured", max(gather.values()), _LATENCY, _UNBOUNDED, _UNBOUNDED, overhead, manager=costs)


def forecast_tpot(trace: Trace, share: int, profile: HardwareProfile, record_bytes: int) -> float:
    """Seconds per token of one request at a time, device-managed and without prediction."""
    assert profile.manager is not None
    slots = parse_slots(f"{share}%", trace)
    model = ModelProfile(record_bytes, 0, 0)
    timeline = DeviceTimeline(trace, slots, profile, model, profile.manager.device_seconds)
    return timeline.run(steps(trace, 1)).tpot_seconds


def forecast_of(path: Path, share: int, profile: HardwareProfile | None, record_bytes: int) -> float | None:
    """``forecast_tpot`` of the trace in ``path``; None where there is none, or no profile."""
    if profile is None or not path.exists():
        return None
    return forecast_tpot(read_trace(path), share, profile, record_bytes)
