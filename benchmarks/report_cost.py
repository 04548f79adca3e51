"""What reporting costs: the thread of the steps for each step, and the interpreter once a second.

    python benchmarks/report_cost.py

Counts the time of the calling thread alone, so other load on the machine does not count.
"""

import time
from collections.abc import Callable
from statistics import median

import msgspec
import numpy as np

from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.report.activity import Activity, LayerIds
from vllm_moe_offload.report.summary import Summary
from vllm_moe_offload.stats import Stats

LAYERS, EXPERTS = 48, 128
STEPS = 30
"""Of a second."""
ROUNDS = 20


def seconds(act: Callable[[], object]) -> float:
    started = time.thread_time()
    act()
    return time.thread_time() - started


def measure(used: int, requests: int) -> str:
    """With so many experts of each layer used by each step, and so many requests in it."""
    activity = Activity(Stats(), [LayerIds(f"layer {index}", index * EXPERTS, EXPERTS) for index in range(LAYERS)])
    summary = Summary(activity)
    draw = np.random.default_rng(0)
    ids = [np.sort(draw.permutation(EXPERTS)[:used]) + layer.first for layer in activity.layers]
    report = LoadReport(hits=used)
    scheduled = {f"cmpl-{number:032x}": 1 for number in range(requests)}

    def steps() -> None:
        for _ in range(STEPS):
            activity.begin_step(dict(scheduled))
            for layer, needed in enumerate(ids):
                activity.use(layer, needed)
                activity.note(layer, report)
            activity.end_step()

    of_steps, of_reports = [], []
    for _ in range(ROUNDS):
        of_steps.append(seconds(steps) / STEPS)
        of_reports.append(seconds(lambda: summary.update(1.0)))
    resident = np.zeros((LAYERS, EXPERTS), np.uint8)
    writing = seconds(lambda: msgspec.msgpack.encode(summary.expert_map(resident)))
    return (
        f"{used:4} experts of {LAYERS} layers, {requests:4} requests: {1e6 * median(of_steps):.1f} us a step, "
        f"{1e3 * (median(of_reports) + writing):.2f} ms a report"
    )


if __name__ == "__main__":
    for case in ((8, 1), (8, 4), (32, 256)):
        print(measure(*case))
