"""vLLM's own worker, with stopwatches: around loading the model and, when asked, around the layers of a step."""

import time
from statistics import median
from typing import Any, NamedTuple

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class _Call(NamedTuple):
    """One layer's experts being computed, stalls included."""

    began: float
    ended: float
    rows: int


class TimedWorker(PlatformWorker):
    """Knows how long its part of the model took to load, and what the layers of its steps took."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As the platform's worker, timed."""
        started = time.perf_counter()
        super().load_model(*args, **kwargs)
        self._model_seconds = time.perf_counter() - started

    def model_seconds(self) -> float:
        """Seconds that load_model took."""
        return self._model_seconds

    def time_layers(self) -> None:
        """Time every offloaded layer from now on. Costs about a microsecond per layer and step."""
        self._calls: list[_Call] = []
        methods = {getattr(module, "quant_method", None) for module in self.model_runner.get_model().modules()}
        offloaded = [method for method in methods if hasattr(method, "pooled")]
        self._layers = len(offloaded)
        for method in offloaded:
            method.compute = self._timed(method.compute)

    def _timed(self, compute: Any) -> Any:
        def timed(layer: Any, x: Any, *args: Any) -> Any:
            began = time.perf_counter()
            output = compute(layer, x, *args)
            self._calls.append(_Call(began, time.perf_counter(), len(x)))
            return output

        return timed

    def layer_times(self) -> dict[str, Any]:
        """Medians over the steps since the last call, by rows of the step, in seconds.

        `experts`: a layer's experts, with all that offloading adds and every stall. `between`: from there to the next
        layer's. `step`: from a step's last layer to the next step's first.
        """
        calls, self._calls = self._calls, []
        steps = [calls[start : start + self._layers] for start in range(0, len(calls), self._layers)]
        times: dict[str, Any] = {}
        for rows in sorted({step[0].rows for step in steps}):
            chosen = [number for number, step in enumerate(steps) if step[0].rows == rows and number > 0]
            pairs = [pair for n in chosen for pair in zip(steps[n], steps[n][1:], strict=False)]
            if pairs:
                times[str(rows)] = {
                    "experts": median(call.ended - call.began for n in chosen for call in steps[n]),
                    "between": median(after.began - before.ended for before, after in pairs),
                    "step": median(steps[n][0].began - steps[n - 1][-1].ended for n in chosen),
                    "steps": len(chosen),
                }
        return times
