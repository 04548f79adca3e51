"""Counters of one worker since its start."""

from dataclasses import asdict, dataclass

from .load_report import LoadReport


@dataclass
class Counters:
    hits: int = 0
    """Experts a layer needed and found in a slot."""
    misses: int = 0
    """Experts a layer needed and had to wait for."""
    streamed: int = 0
    """Experts a long prefill found loaded, or being loaded, because the layer before had started them."""
    loads: int = 0
    loaded_bytes: int = 0
    failed_loads: int = 0
    stall_seconds: float = 0.0
    """Time forward passes spent waiting for loads."""
    prefetches: int = 0
    """Loads started on a prediction. Those in the next three are over; the others still lie unused in their slots."""
    prefetch_useful: int = 0
    """There when first needed."""
    prefetch_late: int = 0
    """Still loading when needed."""
    prefetch_wasted: int = 0
    """Evicted before anyone needed them."""
    prediction_failures: int = 0
    """Exceptions after which this engine goes on without prediction."""
    steps: int = 0
    tokens: int = 0
    """Scheduled in these steps, those of prompts included."""
    waves: int = 0
    """Kernel calls beyond the first of a layer, made because its experts did not fit in the slots together."""

    def add(self, report: LoadReport) -> None:
        """Count what a pool has done."""
        self.hits += report.hits
        self.misses += report.misses
        self.streamed += report.streamed
        self.loads += report.loads
        self.loaded_bytes += report.loaded_bytes
        self.failed_loads += report.failed
        self.stall_seconds += report.waited
        self.prefetches += report.started - report.withdrawn
        self.prefetch_useful += report.useful
        self.prefetch_late += report.late
        self.prefetch_wasted += report.wasted

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)
