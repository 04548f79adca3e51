"""What steps leave for the next report: the thread of the steps appends, the thread that reports takes it away."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..load_report import LoadReport
from ..stats import Stats

_MOST_WAITING = 1 << 18
"""Uses that wait to be taken; older ones are lost where a thread gets no time for minutes."""


class LayerIds(NamedTuple):
    """The ids under which uses of a layer are noted."""

    name: str
    first: int
    experts: int


class EndedStep(NamedTuple):
    """What one step has done, for the requests that took part in it."""

    scheduled: Mapping[str, int]
    """Tokens, by request."""
    experts: int
    misses: int
    stall_seconds: float


class Activity:
    """Of one model. Costs a step about a quarter of a microsecond per layer, and one per step.

    Args:
        stats: of the model's runtime, which counts before it notes anything here.
        layers: as the runtime numbers them.
    """

    def __init__(self, stats: Stats, layers: Sequence[LayerIds]):
        self.layers = layers
        self.hits = [0] * len(layers)
        self.misses = [0] * len(layers)
        self.stall_seconds = [0.0] * len(layers)
        self.last_stall = 0.0
        """Seconds that the step ended last has waited."""
        self._stats = stats
        self._uses: deque[tuple[int, NDArray[np.integer]]] = deque(maxlen=_MOST_WAITING)
        self._routed: deque[NDArray[np.integer]] = deque(maxlen=_MOST_WAITING)
        self._steps: deque[EndedStep | Collection[str]] = deque(maxlen=_MOST_WAITING)
        self._scheduled: Mapping[str, int] | None = None
        """Of the running step."""
        self._before = (0, 0.0, 0)

    def begin_step(self, scheduled: Mapping[str, int]) -> None:
        """A step over these tokens by request starts, which must not change any more."""
        self._scheduled, self._before = scheduled, self._counted()

    def end_step(self) -> None:
        """The step is over. Without effect where none has begun."""
        if self._scheduled is None:
            return
        experts, stalled, misses = self._before
        experts_now, stalled_now, misses_now = self._counted()
        ended = EndedStep(self._scheduled, experts_now - experts, misses_now - misses, stalled_now - stalled)
        self._scheduled = None
        self.last_stall = ended.stall_seconds
        self._steps.append(ended)

    def end_requests(self, requests: Collection[str]) -> None:
        """Requests have finished or were aborted; the collection must not change any more."""
        if requests:
            self._steps.append(requests)

    def use(self, layer: int, ids: NDArray[np.integer]) -> None:
        """A layer uses these distinct ids, counted from its first. They must not change any more."""
        self._uses.append((layer, ids))

    def note(self, layer: int, report: LoadReport) -> None:
        """What a pool has done for a layer."""
        self.hits[layer] += report.hits
        self.misses[layer] += report.misses
        self.stall_seconds[layer] += report.waited

    def note_routed(
        self,
        scheduled: Mapping[str, int],
        ids: NDArray[np.integer],
        used: NDArray[np.integer],
        misses: NDArray[np.integer],
    ) -> None:
        """A whole step at once, which a device has served: no ``begin_step`` and ``end_step`` are of it.

        Args:
            scheduled: tokens by request, which must not change any more.
            ids: ``[layers, rows, top_k]``.
            used, misses: ``[layers]``: distinct experts, and those among them that were not there.
        """
        self._steps.append(EndedStep(scheduled, int(used.sum()), int(misses.sum()), 0.0))
        for layer, (needed, missed) in enumerate(zip(used.tolist(), misses.tolist(), strict=True)):
            self.hits[layer] += needed - missed
            self.misses[layer] += missed
        self._routed.append(ids)

    def take_uses(self, experts: int) -> NDArray[np.float32]:
        """``[layers, experts]``: steps that used each since the last call."""
        counts = np.zeros((len(self.layers), experts), dtype=np.float32)
        uses = [self._uses.popleft() for _ in range(len(self._uses))]
        if uses:
            layers, ids = zip(*uses, strict=True)
            lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
            offsets = np.array([row * experts - layer.first for row, layer in enumerate(self.layers)])
            places = np.concatenate(ids) + np.repeat(offsets[np.array(layers)], lengths)
            counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
        for routed in [self._routed.popleft() for _ in range(len(self._routed))]:
            step = np.zeros((len(self.layers), experts + 1), dtype=bool)
            step[np.arange(len(routed))[:, None, None], routed] = True  # -1 is the last column
            counts += step[:, :experts]
        return counts

    def take_steps(self) -> list[EndedStep | Collection[str]]:
        """Steps that have ended since the last call, and between them the requests that ended, in order."""
        return [self._steps.popleft() for _ in range(len(self._steps))]

    def _counted(self) -> tuple[int, float, int]:
        stats = self._stats
        return stats.hits + stats.misses, stats.stall_seconds, stats.misses
