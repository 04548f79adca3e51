"""How many slots a budget gives each record layout. Pure arithmetic."""

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from ..errors import ConfigError
from ..sizes import size_setting, size_text

Layout = TypeVar("Layout")


class LayoutNeeds(NamedTuple):
    """What the layers of one record layout ask of a pool."""

    record_bytes: int
    """Bytes of one expert without padding."""
    experts: int
    """Experts of all its layers together."""
    minimum: int
    """Slots that the largest choice of one token takes."""

    @property
    def total_bytes(self) -> int:
        return self.record_bytes * self.experts

    @property
    def minimum_bytes(self) -> int:
        return self.record_bytes * self.minimum


def slots_for_budget(needs: Mapping[Layout, LayoutNeeds], budget_bytes: int, setting: str) -> dict[Layout, int]:
    """Slots per layout, by the layouts' shares of all expert bytes, never more than a layout has experts.

    A layout whose share is less than one token needs gets what one token needs; the others share the rest.

    Args:
        needs: by layout, or whatever stands for it.
        budget_bytes: fast memory for all of them together.
        setting: the key and what the user wrote, for the error.

    Raises:
        ConfigError: the budget cannot hold one token's experts of every layout; names the smallest that works.
    """
    if budget_bytes < sum(need.minimum_bytes for need in needs.values()):
        raise _too_little(needs.values(), budget_bytes, setting)
    slots: dict[Layout, int] = {}
    rest = budget_bytes
    sharing = dict(needs)
    while sharing:
        total = sum(need.total_bytes for need in sharing.values())
        shares = {key: min(need.experts, need.experts * rest // total) for key, need in sharing.items()}
        short = [key for key, need in sharing.items() if shares[key] < need.minimum]
        if not short:
            slots |= shares
            break
        for key in short:
            need = sharing.pop(key)
            slots[key] = need.minimum
            rest -= need.minimum_bytes
    assert sum(slots[key] * need.record_bytes for key, need in needs.items()) <= budget_bytes
    assert all(need.minimum <= slots[key] <= need.experts for key, need in needs.items())
    return {key: slots[key] for key in needs}


def _too_little(needs: Collection[LayoutNeeds], budget_bytes: int, setting: str) -> ConfigError:
    smallest = sum(need.minimum_bytes for need in needs)
    per_mille = -(-1000 * smallest // sum(need.total_bytes for need in needs))
    return ConfigError(
        f"{setting} gives {size_text(budget_bytes)}, too little to hold the experts of one token; "
        f"the smallest that works is '{size_setting(smallest)}' ({per_mille / 10:.1f}%)"
    )
