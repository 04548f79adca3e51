"""What no policy can beat, and the plainest one: Belady, least-recently-used per layer, and perfect foresight."""

import heapq
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace
from .forecast import Forecast

_NEVER = 1 << 60


def access_sequence(trace: Trace, schedule: Iterable[NDArray[np.int64]]) -> list[list[int]]:
    """Flat ids read together, in the order of execution: one list per layer of each step."""
    layers, experts, _ = trace.shape
    chosen = trace.experts.astype(np.int64) + (np.arange(layers) * experts)[None, :, None]
    sequence: list[list[int]] = []
    for rows in schedule:
        if len(rows) == 1:
            sequence.extend(chosen[rows[0]].tolist())
        else:
            sequence.extend(np.unique(chosen[rows, layer]).tolist() for layer in range(layers))
    return sequence


def belady_miss_rate(sequence: list[list[int]], slots: int) -> float:
    """Share of uses that miss when the expert used furthest in the future is always evicted, without prefetching."""
    next_use = _next_uses(sequence)
    resident: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    misses = uses = 0
    for time, group in enumerate(sequence):
        following = next_use[time]
        for expert, upcoming in zip(group, following, strict=True):
            uses += 1
            if expert not in resident:
                misses += 1
                if len(resident) >= slots:
                    _evict_furthest(resident, furthest, group)
            resident[expert] = upcoming
            heapq.heappush(furthest, (-upcoming, expert))
    return misses / uses if uses else 0.0


def lru_per_layer_miss_rate(sequence: list[list[int]], slots: int, layers: int) -> float:
    """Share of uses that miss when every layer has its own equal share of the slots and evicts its least recent."""
    shares = [slots // layers + (layer < slots % layers) for layer in range(layers)]
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]
    misses = uses = 0
    for time, group in enumerate(sequence):
        cache, share = caches[time % layers], shares[time % layers]
        for expert in group:
            uses += 1
            if expert in cache:
                cache.move_to_end(expert)
                continue
            misses += 1
            cache[expert] = None
            if len(cache) > share:
                cache.popitem(last=False)
    return misses / uses if uses else 0.0


def perfect_forecast(trace: Trace, distances: tuple[int, ...]) -> Forecast:
    """The forecast of a predictor that is never wrong."""
    layers, experts, _ = trace.shape
    used = np.zeros((trace.num_tokens, 1, layers, experts), np.float16)
    np.put_along_axis(used[:, 0], trace.experts.astype(np.int64), np.float16(1), axis=2)
    shape = (trace.num_tokens, len(distances), layers, experts)
    return Forecast(distances, np.broadcast_to(used, shape))


def _next_uses(sequence: list[list[int]]) -> list[list[int]]:
    upcoming: dict[int, int] = {}
    next_use: list[list[int]] = [[] for _ in sequence]
    for time in reversed(range(len(sequence))):
        next_use[time] = [upcoming.get(expert, _NEVER) for expert in sequence[time]]
        for expert in sequence[time]:
            upcoming[expert] = time
    return next_use


def _evict_furthest(resident: dict[int, int], furthest: list[tuple[int, int]], running: list[int]) -> None:
    """Evict the resident expert used last; entries whose expert has been used since are stale and dropped."""
    kept: list[tuple[int, int]] = []
    while furthest:
        entry = heapq.heappop(furthest)
        upcoming, expert = -entry[0], entry[1]
        if resident.get(expert) != upcoming:
            continue
        if expert in running:
            kept.append(entry)
            continue
        del resident[expert]
        break
    for entry in kept:
        heapq.heappush(furthest, entry)
