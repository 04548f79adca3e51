"""Workers that report what an engine's might, without one: real report files of made-up figures."""

import time
from pathlib import Path

import numpy as np

from vllm_moe_offload.report import (
    ExpertMap,
    Histogram,
    Prediction,
    ReportFile,
    RequestReport,
    Residency,
    Role,
    WorkerReport,
)
from vllm_moe_offload.report.report import REQUEST_SECONDS, STEP_SECONDS
from vllm_moe_offload.stats import WORKER_STATISTICS, Stats

RECORD_BYTES = 9 << 20


class Worker:
    """One model of one worker, whose figures grow with every ``step``.

    Args:
        folder: of the reports.
        known: whether the host knows which experts are resident.
    """

    def __init__(
        self,
        folder: Path,
        layers: int = 6,
        experts: int = 16,
        slots: float = 0.25,
        rank: int = 0,
        engine: str = "e0ffee",
        role: Role = Role.TARGET,
        known: bool = True,
    ):
        self.shape = layers, experts
        self._random = np.random.default_rng(rank)
        popularity = 1 / np.arange(1, experts + 1) ** 1.1
        self._popularity = np.stack([self._random.permutation(popularity / popularity.sum()) for _ in range(layers)])
        self._kept = max(1, round(experts * slots))
        self.uses = np.zeros(self.shape, np.float32)
        self.hits, self.misses, self.stalls = (np.zeros(layers) for _ in range(3))
        self.stats = Stats(
            layers=layers,
            experts=layers * experts,
            expert_bytes=layers * experts * RECORD_BYTES,
            slots=layers * self._kept,
            slot_bytes=layers * self._kept * RECORD_BYTES,
            history_requests=412,
        )
        self.report = WorkerReport(
            engine=engine,
            model="org/model-moe",
            served_model="model-moe",
            role=role,
            pid=4000 + rank,
            replica=0,
            rank=rank,
            started=time.time() - 900,
            time=time.time(),
            stats={},
            step_stalls=Histogram.empty(STEP_SECONDS),
            request_stalls=Histogram.empty(REQUEST_SECONDS),
            experts=ExpertMap(
                [f"model.layers.{layer}.mlp.experts" for layer in range(layers)], experts, b"", b"", [], [], []
            ),
            predictor="history",
            prediction=Prediction.ON,
            prediction_reason="",
            requests=[RequestReport("cmpl-7a51", True), RequestReport("cmpl-19fe", False, 41, 77, 984, 31, 0.4)],
        )
        self._known = known
        self._file = ReportFile(folder, f"{engine}-{role}-{rank}")

    def step(self, tokens: int = 1, seconds: float = 0.0) -> None:
        """Compute some tokens, ``seconds`` after the last."""
        used = self._random.random(self.shape) < 1 - (1 - self._popularity) ** (4 * tokens)
        self.uses = self.uses * np.float32(0.5 ** (seconds / 60)) + used.astype(np.float32) * tokens
        resident = self.resident()
        hits, misses = (used & resident).sum(axis=1), (used & ~resident).sum(axis=1)
        self.hits, self.misses = self.hits + hits, self.misses + misses
        self.stalls = self.stalls + misses * 0.0004
        stats = self.stats
        stats.steps += 1
        stats.tokens += tokens
        stats.hits, stats.misses = int(self.hits.sum()), int(self.misses.sum())
        stats.stall_seconds = float(self.stalls.sum())
        stats.prefetches += int(misses.sum())
        stats.prefetch_useful += int(misses.sum() * 0.7)
        stats.prefetch_late += int(misses.sum() * 0.1)
        stats.prefetch_wasted += int(misses.sum() * 0.15)
        stats.loads = stats.misses + stats.prefetches
        stats.demanded_bytes, stats.prefetched_bytes = stats.misses * RECORD_BYTES, stats.prefetches * RECORD_BYTES
        stats.loaded_bytes = stats.demanded_bytes + stats.prefetched_bytes
        self.report.time += seconds

    def resident(self) -> np.ndarray:
        """bool [layers, experts]: those used most, as many as there are slots."""
        order = np.argsort(-(self.uses + self._popularity * 1e-3), axis=1)
        resident = np.zeros(self.shape, bool)
        np.put_along_axis(resident, order[:, : self._kept], True, axis=1)
        return resident

    def write(self, at: float | None = None) -> None:
        """Replace the file; ``at`` is the time of the report, by default now."""
        report = self.report
        report.time = time.time() if at is None else at
        report.stats = self.stats.as_dict(WORKER_STATISTICS)
        running = report.requests[0]
        running.tokens, running.experts = self.stats.tokens, self.stats.hits + self.stats.misses
        running.misses, running.stall_seconds = self.stats.misses, self.stats.stall_seconds
        states = np.where(self.resident(), Residency.RESIDENT, Residency.ABSENT).astype(np.uint8)
        experts = report.experts
        experts.resident = states.tobytes() if self._known else b""
        experts.uses = self.uses.tobytes()
        experts.hits, experts.misses = self.hits.astype(int).tolist(), self.misses.astype(int).tolist()
        experts.stall_seconds = self.stalls.tolist()
        self._file.write(report)

    def close(self) -> None:
        self._file.close()
