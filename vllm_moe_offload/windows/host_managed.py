"""Windows that the host manages: it sees the routing of each layer, and enqueues the copies of what is missing.

They are the pools of a runtime in place of the host pools behind them, and pass on when those are exchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..cache import ExpertCache, create_policy
from ..device.base import Device
from ..pool.base import HostPool, PoolGoneError
from ..pool.operations import Operations
from ..store.layout import RecordLayout
from ..store.manifest import LayerEntry
from ..store.pools import pools_of
from .clock import KernelClock
from .host_tier import HostReads, HostTier
from .memory import WindowMemory
from .plan import WindowPlan
from .pool import WindowPool
from .stage import Stages


class HostPoolSource(Protocol):
    """Who keeps host pools, as ``PoolSource`` does pools of any kind."""

    before_exchange: Callable[[], None]
    """Called before other memory comes to lie at the addresses of the slots, or this memory becomes private."""

    @property
    def pools(self) -> Mapping[str, HostPool]: ...
    def begin_step(self) -> bool: ...
    def fail_over(self, reason: PoolGoneError) -> None: ...


class HostManaged:
    """The windows of one model; a ``PoolSource`` whose pools stay the same.

    Args:
        layers: of the store.
        plans: of the windows of each layout.
        host: the pools behind the windows, by layer.
        policy: name of the eviction policy of each window.
        source: of the host pools, if it may exchange them.

    Raises:
        OutOfDeviceMemoryError: the device has less memory than these slots take.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[LayerEntry],
        plans: Mapping[RecordLayout, WindowPlan],
        host: Mapping[str, HostPool],
        policy: str,
        source: HostPoolSource | None = None,
    ):
        self._source = source
        self._operations = Operations(lambda: HostReads(device))
        self._clock = KernelClock(device)
        self._warm_up = True
        """No step has begun: what was routed so far only warmed the engine up."""
        self.memories: dict[RecordLayout, WindowMemory] = {}
        self._stages: list[Stages] = []
        self._tiers: dict[str, HostTier] = {}
        """By the name of the first layer of each layout."""
        self.pools: dict[str, WindowPool] = {}
        """By layer."""
        for members in pools_of(layers):
            names = [layers[index].name for index in members.layers]
            plan = plans[members.layout]
            assert plan.experts == members.counts
            memory = self.memories[members.layout] = WindowMemory(device, members.layout, plan)
            tier = self._tiers[names[0]] = HostTier(device, host[names[0]], self._operations)
            stages = Stages(device, memory)
            windows = self._windows(names, memory, tier, stages, policy)
            stages.lenders = [windows[member] for member in sorted(plan.lent)]
            self._stages.append(stages)
            self.pools |= zip(names, windows, strict=True)
        if source is not None:
            source.before_exchange = self._unregister

    def _windows(
        self, names: Sequence[str], memory: WindowMemory, tier: HostTier, stages: Stages, policy: str
    ) -> list[WindowPool]:
        windows, first = [], 0
        for member in range(len(names)):
            experts, slots = memory.plan.experts[member], memory.plan.slots[member]
            one_layer = np.zeros(experts, dtype=np.int64)
            cache = ExpertCache(one_layer, slots, create_policy(policy, one_layer), at_home=slots == experts)
            layer = range(first, first + experts)
            windows.append(
                WindowPool(memory, member, layer, cache, tier, stages, self._clock, self._operations, member == 0)
            )
            first += experts
        return windows

    @property
    def host_bytes(self) -> int:
        """Of experts, that the host pools can hold."""
        sources = [tier.source for tier in self._tiers.values()]
        return sum(source.capacity * source.layout.payload_bytes for source in sources)

    @property
    def unregistered(self) -> str:
        """Why the device cannot read host memory where it lies; empty where it can."""
        return next((tier.refused for tier in self._tiers.values() if tier.refused), "")

    def begin_step(self) -> bool:
        """A step begins: what its windows read of host pools has been copied. Returns False: they stay the same."""
        self._operations.nothing_is_held()
        with self._operations:
            self._operations.loader.finish()
            self._clock.begin_step()
            for stages in self._stages:
                stages.forget()
            if self._warm_up:
                for window in self.pools.values():
                    window.empty()
                self._warm_up = False
        if self._source is not None and self._source.begin_step():
            self._exchange(self._source.pools)
        return False

    def fail_over(self, reason: PoolGoneError) -> None:
        """The host pools are gone: put those that work behind the windows, which are empty then."""
        assert self._source is not None, reason
        with self._operations:
            self._operations.loader.finish()
        self._source.fail_over(reason)
        self._exchange(self._source.pools)

    def close(self) -> None:
        """Nothing is copied any more, and the host pools are closed: their memory may go. Idempotent."""
        self._operations.close()
        self._unregister()
        for tier in self._tiers.values():
            tier.source.close()

    def _exchange(self, host: Mapping[str, HostPool]) -> None:
        for name, tier in self._tiers.items():
            tier.exchange(host[name])

    def _unregister(self) -> None:
        for tier in self._tiers.values():
            tier.unregister()
