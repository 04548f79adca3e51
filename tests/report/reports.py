"""Reports as workers write them."""

from typing import Any

import numpy as np

from vllm_moe_offload.report import ExpertMap, Histogram, Prediction, RequestReport, Residency, Role, WorkerReport
from vllm_moe_offload.report.report import REQUEST_SECONDS, STEP_SECONDS
from vllm_moe_offload.stats import WORKER_STATISTICS, Stats


def a_report(**changed: Any) -> WorkerReport:
    """Of two layers with three and two experts."""
    resident = np.array([[Residency.RESIDENT, Residency.PINNED, Residency.ABSENT], [1, 1, 0]], np.uint8)
    uses = np.array([[3.0, 0.5, 0.0], [1.0, 2.0, 0.0]], np.float32)
    experts = ExpertMap(
        layers=["layer 0", "layer 1"],
        experts=3,
        resident=resident.tobytes(),
        uses=uses.tobytes(),
        hits=[5, 7],
        misses=[1, 0],
        stall_seconds=[0.25, 0.0],
    )
    steps, requests = Histogram.empty(STEP_SECONDS), Histogram.empty(REQUEST_SECONDS)
    steps.add(0.25)
    requests.add(0.25)
    stats = Stats(**{each.name: number + 1 for number, each in enumerate(WORKER_STATISTICS)})
    facts: dict[str, Any] = {
        "engine": "abc12",
        "model": "tiny",
        "served_model": "tiny-moe",
        "role": Role.TARGET,
        "pid": 4711,
        "replica": 0,
        "rank": 0,
        "started": 1.0,
        "time": 2.0,
        "stats": stats.as_dict(WORKER_STATISTICS),
        "step_stalls": steps,
        "request_stalls": requests,
        "experts": experts,
        "predictor": "history",
        "prediction": Prediction.ON,
        "prediction_reason": "",
        "requests": [RequestReport("one", running=False, steps=1, tokens=4, experts=12, misses=1, stall_seconds=0.25)],
    }
    return WorkerReport(**facts | changed)
