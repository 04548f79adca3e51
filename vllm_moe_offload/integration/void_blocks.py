"""Which KV blocks a failed step has left void, who holds them, and how they leave the prefix cache."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class _Released(NamedTuple):
    """What a request held that gave its blocks back while steps of it were in flight: aborted, or preempted."""

    blocks: set[int]
    """Those that the steps in flight were to fill."""
    in_flight: int
    """Tokens of it whose steps have not ended."""


def remember_released(free: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``KVCacheManager.free``: a step in flight may still turn out to have failed."""

    def remember_and_free(self: Any, request: Any) -> Any:
        if request.num_in_flight_tokens > 0:
            released = self.__dict__.setdefault("moe_offload_released", {})
            released[request.request_id] = _Released(_in_flight_blocks(self, request), request.num_in_flight_tokens)
        return free(self, request)

    return remember_and_free


def forget_released(manager: Any, scheduled_tokens: Mapping[str, int]) -> None:
    """A step over these tokens has ended, and whatever it left void has been dealt with."""
    released: dict[str, _Released] = manager.__dict__.get("moe_offload_released", {})
    for request_id in list(released.keys() & scheduled_tokens.keys()):
        kept = released[request_id]
        if kept.in_flight > scheduled_tokens[request_id]:
            released[request_id] = kept._replace(in_flight=kept.in_flight - scheduled_tokens[request_id])
        else:
            del released[request_id]


def spread_over_shared_blocks(scheduler: Any, failed: Mapping[str, str]) -> dict[str, str]:
    """All requests that hold KV blocks which this step left void, with the reason; void blocks leave the prefix cache.

    A request scheduled in the same step as another, or after it while it was in flight, may have taken over blocks that
    the other was only computing.
    """
    manager = scheduler.kv_cache_manager
    released: dict[str, _Released] = manager.__dict__.get("moe_offload_released", {})
    reasons: dict[str, str] = dict(failed)
    spreading = list(failed)
    while spreading:
        request_id = spreading.pop()
        void: set[int] = set()
        if request_id in released:
            void |= released[request_id].blocks
        if request_id in scheduler.requests:
            void |= _in_flight_blocks(manager, scheduler.requests[request_id])
        manager.evict_blocks(void)
        for other in scheduler.requests:
            if other not in reasons and void & _held_blocks(manager, other):
                reasons[other] = reasons[request_id]
                spreading.append(other)
    return reasons


def _held_blocks(manager: Any, request_id: str) -> set[int]:
    return {block for blocks in manager.get_block_ids(request_id) for block in blocks}


def _in_flight_blocks(manager: Any, request: Any) -> set[int]:
    """The blocks of ``request`` from the first that a step in flight writes to."""
    computed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
    groups = zip(manager.get_block_ids(request.request_id), manager.coordinator.single_type_managers, strict=True)
    written = {block for blocks, group in groups for block in blocks[computed // group.block_size :]}
    return written - {manager.block_pool.null_block.block_id}
