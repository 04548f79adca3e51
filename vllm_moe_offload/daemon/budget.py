"""How the daemon's memory is divided among models. Pure arithmetic: bytes and measured need in, bytes out."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)

_STEADY = 0.25
"""Part of a model's weight that does not depend on how much its demands miss, against swings and starvation."""


class Claim(NamedTuple):
    """What one model asks of the budget, in bytes."""

    floor: int
    """Less than this it cannot have."""
    ceiling: int
    """More than this it must not have: all its experts, or what the operator allows."""
    wanted: int
    """What its attached workers were configured to use; 0 when nobody is attached."""
    held: int
    """What it occupies now."""
    pressure: float = 0.0
    """Bytes per second that forward passes lately waited for."""


def split(claims: Mapping[Key, Claim], budget: int) -> dict[Key, int]:
    """Bytes for every model: never more than ``budget`` together, floors first.

    Models in use come up to what they want, in proportion to it and to the misses they suffer. What remains stays
    with the models nobody uses at present, as far as they hold it, so that they are warm when someone comes back.
    What remains then lets the models in use grow beyond what they asked for.

    Raises:
        ValueError: the floors do not fit.
    """
    floors = sum(claim.floor for claim in claims.values())
    if floors > budget:
        raise ValueError(f"{floors} bytes are the least that fits, the budget is {budget}")
    misses = sum(claim.pressure for claim in claims.values())
    shares = {key: claim.floor for key, claim in claims.items()}
    used = {key: claim for key, claim in claims.items() if claim.wanted > 0}
    weights = {
        key: claim.wanted * (_STEADY + (claim.pressure / misses if misses > 0 else 1.0)) for key, claim in used.items()
    }
    idle = {key: claim for key, claim in claims.items() if claim.wanted == 0}
    _fill(shares, {key: min(claim.wanted, claim.ceiling) for key, claim in used.items()}, weights, budget)
    _fill(
        shares,
        {key: min(claim.held, claim.ceiling) for key, claim in idle.items()},
        {key: float(claim.held) for key, claim in idle.items()},
        budget,
    )
    _fill(shares, {key: claim.ceiling for key, claim in used.items()}, weights, budget)
    return shares


def _fill(shares: dict[Key, int], tops: Mapping[Key, int], weights: Mapping[Key, float], budget: int) -> None:
    """Raise ``shares`` towards ``tops``, in proportion to ``weights`` and never downwards, within what is left."""
    available = budget - sum(shares.values())
    least = {key: shares[key] for key in tops}
    room = sum(max(0, tops[key] - least[key]) for key in tops)
    if room <= available:
        shares.update({key: max(least[key], tops[key]) for key in tops})
        return

    def at(level: float) -> dict[Key, int]:
        return {key: max(least[key], min(tops[key], int(level * weights[key]))) for key in tops}

    low, high = 0.0, max(tops[key] / weights[key] for key in tops if weights[key] > 0)
    for _ in range(80):
        middle = (low + high) / 2
        if sum(at(middle).values()) - sum(least.values()) <= available:
            low = middle
        else:
            high = middle
    shares.update(at(low))


class PoolSize(NamedTuple):
    """What a pool takes when full, and what each slot takes before that."""

    experts: int
    record_bytes: int
    """Of one expert without padding: full, records lie back to back."""
    slot_bytes: int
    """Memory that one slot alone can take: whole pages, also those it shares."""

    @property
    def full_bytes(self) -> int:
        return self.experts * self.record_bytes

    def taken(self, slots: int) -> int:
        """Bytes that so many slots take at most."""
        return min(slots * self.slot_bytes, self.full_bytes)


def slots_within(pools: Sequence[PoolSize], budget: int) -> list[int]:
    """Slots of each pool of a model, by the pools' shares of all its bytes."""
    full = sum(pool.full_bytes for pool in pools)
    if budget >= full:
        return [pool.experts for pool in pools]
    return [min(pool.experts, budget * pool.full_bytes // full // pool.slot_bytes) for pool in pools]


def bytes_for(pools: Sequence[PoolSize], slots: Sequence[int]) -> int:
    """The least that ``slots_within`` makes at least so many slots of."""
    full = sum(pool.full_bytes for pool in pools)
    needed = [-(-count * pool.slot_bytes * full // pool.full_bytes) for pool, count in zip(pools, slots, strict=True)]
    return min(full, max(needed))
