"""How many slots a budget gives each record layout. Pure arithmetic."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from ..errors import ConfigError

Layout = TypeVar("Layout")


class LayoutNeeds(NamedTuple):
    """What the layers of one record layout ask of a pool."""

    record_bytes: int
    """Bytes of one expert without padding."""
    experts: int
    """Experts of all its layers together."""
    minimum: int
    """Slots that the largest choice of one token takes."""


def slots_for_budget(needs: Mapping[Layout, LayoutNeeds], budget_bytes: int, setting: str) -> dict[Layout, int]:
    """Slots per layout, by the layouts' shares of all expert bytes, never more than a layout has experts.

    Args:
        needs: by layout, or whatever stands for it.
        budget_bytes: fast memory for all of them together.
        setting: what the user wrote, for the error.

    Raises:
        ConfigError: some layout would get fewer slots than one token needs; names the smallest budget that works.
    """
    total = sum(need.record_bytes * need.experts for need in needs.values())
    slots = {key: min(need.experts, need.experts * budget_bytes // total) for key, need in needs.items()}
    if any(slots[key] < need.minimum for key, need in needs.items()):
        smallest = max(-(-1000 * need.minimum // need.experts) for need in needs.values())
        minimum_bytes = max(-(-total * need.minimum // need.experts) for need in needs.values())
        raise ConfigError(
            f"cache = {setting} gives {budget_bytes / 2**20:.1f} MiB, too little to hold the experts of one token; "
            f"the smallest that works for this model is '{-(-minimum_bytes // 2**20)}MiB' ({smallest / 10:.1f}%)"
        )
    return slots
