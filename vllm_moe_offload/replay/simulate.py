"""Replay without hardware: a load admitted at least one layer before its use is taken to be in time."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy
from ..trace.trace import Trace
from .forecast import Forecast
from .replay_cache import ReplayCache, Tally


def simulate(
    trace: Trace,
    schedule: Iterable[NDArray[np.int64]],
    slots: int,
    policy: EvictionPolicy,
    forecast: Forecast | None = None,
    threshold: float = 1.0,
) -> Tally:
    """Run the policy over the steps of ``schedule``, prefetching what is given more than ``threshold``.

    Without a forecast nothing is prefetched. Layer 0 never is: no layer runs before it.

    Raises:
        ConfigError: the slots cannot hold the experts of one layer of one step.
    """
    layers, experts, _ = trace.shape
    cache, tally = ReplayCache(layers, experts, slots, policy), Tally()
    chosen = trace.experts.astype(np.int64) + (np.arange(layers) * experts)[None, :, None]
    for rows in schedule:
        cache.begin_step()
        speculative = _SpeculativeLoads(cache, tally, forecast, rows, threshold)
        speculative.prefetch_from(-1)
        for layer in range(layers):
            ids = chosen[rows[0], layer] if len(rows) == 1 else np.unique(chosen[rows, layer])
            _, pinned, report = cache.use(layer, ids)
            tally.add(report)
            speculative.prefetch_from(layer)
            cache.release(pinned)
    tally.add(cache.finish())
    return tally


class _SpeculativeLoads:
    """What one step prefetches, layer by layer."""

    def __init__(
        self,
        cache: ReplayCache,
        tally: Tally,
        forecast: Forecast | None,
        rows: NDArray[np.int64],
        threshold: float,
    ):
        self._cache, self._tally = cache, tally
        self._distances = forecast.distances if forecast is not None else ()
        if forecast is not None:
            self._probabilities = forecast.of_step(rows)
            self._likely = self._probabilities > threshold
            self._any_likely = np.any(self._likely, axis=2, keepdims=True)[:, :, 0]

    def prefetch_from(self, layer: int) -> None:
        """``layer`` has been routed; -1 is the step's start, when nothing can still be in time for layer 0."""
        cache, experts = self._cache, self._cache.experts
        for slot, distance in enumerate(self._distances):
            target = layer + distance
            if target == 0 or target >= self._any_likely.shape[1]:
                continue
            first = target * experts
            probabilities = self._probabilities[slot, target]
            cache.policy.expected[first : first + experts] = probabilities
            if self._any_likely[slot, target]:
                wanted = np.flatnonzero(self._likely[slot, target] & cache.absent(target))
                if len(wanted):
                    ranked = wanted[np.argsort(-probabilities[wanted], kind="stable")]
                    _, report = cache.prefetch(target, first + ranked)
                    self._tally.add(report)
