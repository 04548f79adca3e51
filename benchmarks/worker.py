"""The package's runner with stopwatches inside the engine; see its integration/bench.py.

By its place, not by its name: the plugin may come from another checkout.
"""

from typing import Any

from by_path import module_at

Runner: Any = module_at("integration/bench.py").Runner


class TimedRunner(Runner):
    """vLLM's engine with a worker that knows how long its parts take."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments | {"worker_cls": "timed_worker.TimedWorker"})
        self.model_seconds = max(self.llm.collective_rpc("model_seconds"))

    def loaded(self) -> dict[str, Any]:
        """What loading took, in seconds, and the plugin's counters after it."""
        return super().loaded() | {"model_seconds": self.model_seconds}

    def time_layers(self) -> None:
        """Start timing the layers of the offloaded model; see `TimedWorker.time_layers`."""
        self.llm.collective_rpc("time_layers")

    def layer_times(self) -> dict[str, Any]:
        """What was timed since the last call, by the first worker."""
        return self.llm.collective_rpc("layer_times")[0]


if __name__ == "__main__":
    module_at("bench/protocol.py").serve(TimedRunner)
