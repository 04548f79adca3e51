"""The flat numbers of experts. Layers whose records have one layout share a pool and count their experts through it.

Engines and the daemon must mean the same expert by the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.store.layout import RecordLayout
from vllm_moe_offload.store.manifest import LayerEntry


@dataclass(frozen=True)
class PoolMembers:
    """The layers of one pool: in the order of the store, each taking as many flat ids as it has experts."""

    layout: RecordLayout
    layers: tuple[int, ...]
    """Indices in the store."""
    counts: tuple[int, ...]
    """Experts of each."""

    @classmethod
    def of(cls, layers: Sequence[LayerEntry], layout: RecordLayout) -> "PoolMembers":
        """Those of a store's ``layers`` whose records have this layout."""
        members = [(index, entry.experts) for index, entry in enumerate(layers) if entry.layout == layout]
        return cls(layout, tuple(index for index, _ in members), tuple(experts for _, experts in members))

    @property
    def experts(self) -> int:
        """All of them; flat ids are smaller."""
        return sum(self.counts)

    @cached_property
    def layer_of(self) -> NDArray[np.int64]:
        """By flat id, the index of the layer in the store."""
        return np.repeat(np.array(self.layers, dtype=np.int64), self.counts)

    @cached_property
    def number_of(self) -> NDArray[np.int64]:
        """By flat id, the expert's number within its layer."""
        return np.concatenate([np.arange(count) for count in self.counts])


def pools_of(layers: Sequence[LayerEntry]) -> list[PoolMembers]:
    """One pool per record layout, in the order in which a store's layers first have it."""
    return [PoolMembers.of(layers, layout) for layout in dict.fromkeys(entry.layout for entry in layers)]
