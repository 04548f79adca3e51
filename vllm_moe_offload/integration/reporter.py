"""Reports once a second what a worker does with one of its models: to files for whoever looks, and to the log."""

import os
import time
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from ..learning.background import Background
from ..report.engine import engine_id
from ..report.files import ReportFile, reports_folder
from ..report.report import Role, WorkerReport
from ..report.summary import Summary
from .report import StatsReport
from .serving import ServedModel

logger = init_logger(__name__)

SECONDS_BETWEEN_REPORTS = 1.0


class Reporter:
    """Reports ``served`` until it is closed, from a thread of its own.

    An engine whose reports cannot be written serves without.

    Args:
        vllm_config: the engine's.
        cpus: where the thread may run.
    """

    def __init__(self, served: ServedModel, vllm_config: Any, cpus: set[int]):
        self._served = served
        self._summary = Summary(served.runtime.activity)
        self._log = StatsReport(served.runtime.stats, "the drafter's " if served.drafts else "")
        self._complained = False
        self._started = self._updated = time.time()
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        name = model.served_model_name
        self._facts: dict[str, Any] = {
            "engine": engine_id() or vllm_config.instance_id,
            "model": Path(served.name).name,
            "served_model": name if isinstance(name, str) else name[0],
            "role": Role.DRAFTER if served.drafts else Role.TARGET,
            "pid": os.getpid(),
            "replica": parallel.data_parallel_index,
            "rank": parallel.rank,
            "started": self._started,
            "predictor": served.predictor,
        }
        file = f"{self._facts['engine']}-{os.getpid()}-{served.runtime.store.path.name}"
        try:
            self._file: ReportFile | None = ReportFile(reports_folder(), file)
        except OSError as error:
            self._file = None
            self._complain(error)
        self._background = Background(self._write, SECONDS_BETWEEN_REPORTS, self._complain, cpus)
        self._background.soon(self._write)

    def report(self) -> WorkerReport:
        """What is to be said now. Called by one thread at a time."""
        now, served = time.time(), self._served
        self._summary.update(now - self._updated)
        self._updated = now
        prediction, reason = served.prediction_state()
        return WorkerReport(
            **self._facts,
            time=now,
            stats=served.measured(),
            step_stalls=self._summary.step_stalls,
            request_stalls=self._summary.request_stalls,
            experts=self._summary.expert_map(served.residency(self._summary.experts)),
            prediction=prediction,
            prediction_reason=reason,
            requests=self._summary.requests,
            daemon_pid=served.daemon_pid,
        )

    def close(self) -> None:
        """The worker ends."""
        self._background.close()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        report = self.report()
        self._log.maybe_log(report.prediction)
        if self._file is not None:
            self._file.write(report)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "metrics, `top` and the page do not show this worker: its reports cannot be written: %s", error
            )
