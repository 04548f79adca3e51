"""What one call of a pool of slots did. The runtime adds it to its statistics and hands it to the prefetcher."""

from typing import NamedTuple


class LoadReport(NamedTuple):
    """Each hit, load, wait and eviction is in exactly one report. Reports of several calls add up to that of all."""

    hits: int = 0
    """Experts a layer needed and found in a slot."""
    misses: int = 0
    """Experts a layer needed and had to wait for."""
    streamed: int = 0
    """Loads started because a long prefill is about to reach their layer."""
    loads: int = 0
    """Reads that have ended, demanded or not."""
    loaded_bytes: int = 0
    prefetched_bytes: int = 0
    """Of ``loaded_bytes``, those of speculative loads."""
    streamed_bytes: int = 0
    """Of ``loaded_bytes``, those of loads started because a long prefill was about to reach their layer."""
    failed: int = 0
    """Of ``loads``, those whose record could not be read."""
    waited: float = 0.0
    """Seconds the forward pass waited for loads."""
    demanded: int = 0
    """Loads the pass needed and nobody had started ahead."""
    demand_seconds: float = 0.0
    """What the loader took for these; a pass that computes meanwhile waits for less."""
    started: int = 0
    """Speculative loads, on a prediction. Each ends as one of the next four, unless its record cannot be read."""
    withdrawn: int = 0
    """Before they had begun to load: their layer does not need them."""
    useful: int = 0
    """There when first needed."""
    late: int = 0
    """Still loading when needed."""
    wasted: int = 0
    """Evicted before anyone needed them."""
    evicted: int = 0
    """Experts that lost their slots to others."""
    late_seconds: float = 0.0
    """Of ``waited``, what was spent on those that were late, all together."""
    host_hits: int = 0
    """Of ``misses`` of slots in device memory, those found in host memory; the others were read from disk."""
    copied: int = 0
    """Records copied from host memory to the device, demanded or not."""
    copied_bytes: int = 0
    copied_prefetched_bytes: int = 0
    """Of ``copied_bytes``, on a prediction."""
    copied_streamed_bytes: int = 0
    """Of ``copied_bytes``, for steps that need more experts of a layer than a window has slots."""

    def __add__(self, other: "LoadReport") -> "LoadReport":  # type: ignore[override]
        return LoadReport._make(map(sum, zip(self, other, strict=True)))


NOTHING = LoadReport()
