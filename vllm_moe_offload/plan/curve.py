"""What slots buy: a replay for each of several sizes, and where more of them stop to pay."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..cache import create_policy
from ..errors import ConfigError
from ..replay.device_timeline import DeviceTimeline
from ..replay.hardware import HardwareProfile, ModelProfile
from ..replay.parallel import run_all
from ..replay.schedule import steps
from ..replay.timeline import Timeline, TimelineReport
from ..trace.trace import Trace

POLICY = "lfu"
_WARM_UP = 1 / 3
"""Of a replay's steps: the first ones fill the cache and are left out."""


class Timing(NamedTuple):
    """What one replay came to. Seconds."""

    hit_rate: float
    """Of the experts that decoding used."""
    stall_seconds: float
    """Of a step, on average."""
    tpot_seconds: float


def timings(
    trace: Trace, slots: Sequence[int], batch: int, hardware: HardwareProfile, model: ModelProfile
) -> list[Timing | None]:
    """Replay ``trace`` with each number of ``slots``, ``batch`` requests at a time, nothing being predicted.

    None where a step needs more experts than there are slots: an engine cuts it up, which no replay does.
    """
    return run_all([partial(_replay, trace, count, batch, hardware, model) for count in slots])


def knee(sizes: Sequence[float], seconds: Sequence[float]) -> int:
    """Index of the size after which more buys least: the point furthest below the line from first to last.

    The idea is that of Kneedle (Satopää et al., 2011), without its smoothing.

    Args:
        sizes: rising.
        seconds: what each comes to.
    """
    assert len(sizes) == len(seconds) > 0
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    if len(x) < 3 or x[-1] == x[0] or y[0] <= y[-1]:
        return 0
    below = (1 - (x - x[0]) / (x[-1] - x[0])) - (y - y[-1]) / (y[0] - y[-1])
    return int(below.argmax())


def _replay(trace: Trace, slots: int, batch: int, hardware: HardwareProfile, model: ModelProfile) -> Timing | None:
    schedule = list(steps(trace, batch))
    warm_up = int(len(schedule) * _WARM_UP)
    try:
        if hardware.manager is not None:
            device = DeviceTimeline(trace, slots, hardware, model, hardware.manager.device_seconds, warm_up=warm_up)
            return _timing(device.run(schedule))
        policy = create_policy(POLICY, np.repeat(np.arange(trace.num_layers), trace.num_experts))
        return _timing(Timeline(trace, slots, policy, None, hardware, model, warm_up).run(schedule))
    except ConfigError:
        return None


def _timing(report: TimelineReport) -> Timing:
    done = report.decoding
    return Timing(1 - done.waited / max(1, done.uses), done.stalled / max(1, done.steps), report.tpot_seconds)
