"""What a GPU would make of a trace, as plain data: both modes, speculative loads, prefill, and the bounds."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace
from .device_timeline import DeviceTimeline, padded
from .forecast import Forecast
from .hardware import HardwareProfile, ModelProfile
from .parallel import run_all
from .schedule import PREFILL_CHUNK
from .step_time import StepTime, most_gain
from .timeline import TimelineReport, prefill_rows

WITHOUT_SPECULATION = "no_prefetch_"
HOST_MANAGED = "host_managed_"
RESIDENT = "resident_"


def on_device(
    trace: Trace,
    schedule: Iterable[NDArray[np.int64]],
    slots: int,
    hardware: HardwareProfile,
    model: ModelProfile,
    speculation: Forecast | None,
) -> dict[str, Any]:
    """Replay ``trace`` on a GPU; the keys are described in docs/gpu.md.

    Args:
        speculation: from the one distance; None where nothing is loaded speculatively.

    Raises:
        ConfigError: a layer's share of ``slots`` is too small for one token.
    """
    assert hardware.manager is not None
    by_device, by_host = hardware.manager.device_seconds, hardware.manager.host_seconds
    steps = list(schedule)
    everything = trace.num_layers * trace.num_experts
    arms: dict[str, tuple[int, float, Forecast | None]] = {
        WITHOUT_SPECULATION: (slots, by_device, None),
        HOST_MANAGED: (slots, by_host, None),
        RESIDENT: (everything, by_device, None),
    }
    if speculation is not None:
        arms[""] = slots, by_device, speculation
    jobs = [partial(_replay, trace, steps, hardware, model, *arm) for arm in arms.values()]
    outcomes = dict(zip(arms, run_all(jobs), strict=True))
    plain = outcomes[WITHOUT_SPECULATION]
    outcomes.setdefault("", plain)
    time = StepTime(hardware, model, *trace.shape)
    report: dict[str, Any] = {"hardware": asdict(hardware)}
    for prefix, outcome in outcomes.items():
        report[f"{prefix}tpot_seconds"] = outcome.tpot_seconds
        report[f"{prefix}stall_seconds_per_token"] = outcome.stall_seconds_per_token
        report[f"{prefix}decode_miss_rate"] = outcome.decoding.waited / max(1, outcome.decoding.uses)
    tally = outcomes[""].tally
    decoding = [len(rows) for rows in steps if not prefill_rows(trace, rows)]
    return report | {
        "planned": {
            "demand_miss_rate": tally.demand_miss_rate,
            "loads_per_use": tally.loads_per_use,
            "useful": tally.useful,
            "late": tally.late,
            "wasted": tally.wasted,
        },
        "speculative_distance": None if speculation is None else speculation.distances[0],
        "most_prediction_gain": most_gain(plain.decoding.seconds - plain.decoding.stalled, plain.decoding.stalled),
        "prefill_tokens": PREFILL_CHUNK,
        "prefill_seconds": time.prefill(PREFILL_CHUNK),
        "prefill_link_seconds": time.layers * time.experts * time.record,
        "narrow_slots": time.layers * min(time.experts, padded(max(decoding, default=1)) * time.top_k),
    }


def _replay(
    trace: Trace,
    steps: list[NDArray[np.int64]],
    hardware: HardwareProfile,
    model: ModelProfile,
    slots: int,
    manager_seconds: float,
    speculation: Forecast | None,
) -> TimelineReport:
    return DeviceTimeline(trace, slots, hardware, model, manager_seconds, speculation).run(steps)
