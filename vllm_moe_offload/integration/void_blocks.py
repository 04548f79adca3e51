"""Which KV blocks a failed step has left void, who holds them, and how they leave the prefix cache.

vLLM puts the full blocks of a chunk into the prefix cache when it schedules the chunk. With asynchronous scheduling, or
pipeline stages, later steps are scheduled before it is known that a step has failed: they write void blocks of the same
request, and other requests take such blocks over. A block that another request was given anew in the meantime is not
void any more: blocks are told apart by their hash as well.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

CachedBlock = tuple[int, Any]
"""Number of a block and the hash under which the prefix cache knows it: together, one content."""


class _Holding(NamedTuple):
    """Blocks of one request that the prefix cache knows."""

    blocks: list[tuple[int, CachedBlock]]
    """Each with the number of the request's tokens up to its end."""
    computed: int
    """The request's tokens whose steps have ended."""
    in_flight: int
    """The tokens after these, whose steps have not."""

    @property
    def written(self) -> set[CachedBlock]:
        """What the steps in flight write: from the block that their first token goes to."""
        return {block for end, block in self.blocks if end > self.computed}

    def holds(self, void: set[CachedBlock]) -> bool:
        return any(block in void for _, block in self.blocks)


def remember_released(release: Callable[..., Any]) -> Callable[..., Any]:
    """Around what takes a request's blocks: a step of it in flight may still turn out to have failed."""

    def remember_and_release(self: Any, request: Any) -> Any:
        holding = _holding(self, request)
        if holding.in_flight > 0 and holding.blocks:
            _released(self).setdefault(request.request_id, []).append(holding)
        return release(self, request)

    return remember_and_release


def forget_released(manager: Any, scheduled_tokens: Mapping[str, int]) -> None:
    """A step over these tokens has ended, and whatever it left void has been dealt with."""
    released = _released(manager)
    for request_id in list(released.keys() & scheduled_tokens.keys()):
        oldest, *later = released[request_id]
        tokens = scheduled_tokens[request_id]
        if oldest.in_flight > tokens:
            later.insert(0, _Holding(oldest.blocks, oldest.computed + tokens, oldest.in_flight - tokens))
        if later:
            released[request_id] = later
        else:
            del released[request_id]


def spread_over_shared_blocks(scheduler: Any, failed: Mapping[str, str]) -> dict[str, str]:
    """All requests that hold KV blocks which this step left void, with the reason; void blocks leave the prefix cache.

    A request scheduled in the same step as another, or after it while it was in flight, may have taken over blocks that
    the other was only computing, and have left in the meantime itself.
    """
    manager = scheduler.kv_cache_manager
    holdings = {request_id: list(kept) for request_id, kept in _released(manager).items()}
    for request_id, request in scheduler.requests.items():
        holdings.setdefault(request_id, []).append(_holding(manager, request))
    reasons: dict[str, str] = dict(failed)
    spreading = list(failed)
    void: set[CachedBlock] = set()
    while spreading:
        request_id = spreading.pop()
        for holding in holdings.get(request_id, ()):
            void |= holding.written
        for other, kept in holdings.items():
            if other not in reasons and any(holding.holds(void) for holding in kept):
                reasons[other] = reasons[request_id]
                spreading.append(other)
    blocks = manager.block_pool.blocks
    manager.evict_blocks({number for number, known_as in void if blocks[number].block_hash == known_as})
    return reasons


def _released(manager: Any) -> dict[str, list[_Holding]]:
    """What requests held that gave their blocks back while steps of them were in flight: oldest first.

    They were aborted, have failed, or were preempted, after which they may go on.
    """
    released: dict[str, list[_Holding]] = manager.__dict__.setdefault("moe_offload_released", {})
    return released


def _holding(manager: Any, request: Any) -> _Holding:
    """What ``request`` holds. Its steps of before a preemption are no matter of the blocks that it was given after."""
    in_flight = request.num_in_flight_tokens - request.num_stale_output_tokens
    all_blocks = manager.block_pool.blocks
    groups = zip(manager.get_block_ids(request.request_id), manager.coordinator.single_type_managers, strict=True)
    blocks = [
        ((index + 1) * group.block_size, (number, all_blocks[number].block_hash))
        for numbers, group in groups
        for index, number in enumerate(numbers)
        if all_blocks[number].block_hash is not None
    ]
    return _Holding(blocks, request.num_computed_tokens - in_flight, in_flight)
