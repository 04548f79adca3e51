"""What has been counted in the last minutes, so that the page shows them when it is opened."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ..threads import ReportedThread, use_lowest_priority
from .model import Model, Sample

SAMPLES_KEPT = 600
SECONDS_BETWEEN_SAMPLES = 1.0
_FIELDS = Sample.__struct_fields__


class Series:
    """The models as they were last seen, and samples of each. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Model, deque[Sample]]] = {}

    def observe(self, models: Iterable[Model]) -> None:
        """Add a sample of every model that has reported since its last one; forget models that are gone."""
        with self._lock:
            seen = {}
            for model in models:
                _, samples = self._seen.get(model.name, (model, deque[Sample](maxlen=SAMPLES_KEPT)))
                last = samples[-1] if samples else None
                if model.time > (last.time if last else 0):
                    samples.append(model.sample(last))
                seen[model.name] = model, samples
            self._seen = seen

    def models(self) -> list[tuple[Model, list[Sample]]]:
        """With their samples, oldest first."""
        with self._lock:
            return [(model, list(samples)) for model, samples in self._seen.values()]


def columns(samples: Sequence[Sample], since: float = 0.0) -> dict[str, list[float]]:
    """What was counted after ``since``, per field of ``Sample``."""
    rows = [msgspec.structs.astuple(sample) for sample in samples if sample.time > since]
    return {name: [row[index] for row in rows] for index, name in enumerate(_FIELDS)}


class Observer:
    """Has a series observe what ``source`` gives, at once and then once a second, until ``close``."""

    def __init__(self, series: Series, source: Callable[[], list[Model]]):
        self._series, self._source = series, source
        self._closing = threading.Event()
        series.observe(source())
        self._thread = ReportedThread(target=self._work, name="moe-offload-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        use_lowest_priority()
        while not self._closing.wait(SECONDS_BETWEEN_SAMPLES):
            self._series.observe(self._source())
