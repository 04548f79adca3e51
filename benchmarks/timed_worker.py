"""vLLM's own worker, with a stopwatch around loading the model: on the CPU platform vLLM logs only a part of it."""

import time
from typing import Any

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class TimedWorker(PlatformWorker):
    """Knows how long its part of the model took to load: reading, processing and packing."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As the platform's worker, timed."""
        started = time.perf_counter()
        super().load_model(*args, **kwargs)
        self._model_seconds = time.perf_counter() - started

    def model_seconds(self) -> float:
        """Seconds that load_model took."""
        return self._model_seconds
