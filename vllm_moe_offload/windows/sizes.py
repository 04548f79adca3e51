"""How many slots each layer's window gets of a budget of device memory. Pure arithmetic.

Slots are handed out in one order whatever the budget, and a budget pays for as many of them as it can. So no layer gets
fewer of a larger one, and all that memory takes besides slots is counted: rows for alignment, rows of components that
are not shared, and stages.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..errors import ConfigError
from ..sizes import size_setting, size_text
from .plan import WindowPlan

Layout = TypeVar("Layout")


class WindowNeeds(NamedTuple):
    """What the layers of one record layout ask of device memory."""

    row_bytes: tuple[int, ...]
    """Of each component of a record."""
    experts: tuple[int, ...]
    """By member."""
    minimum: tuple[int, ...]
    """By member: slots that the choice of one token takes."""
    weights: tuple[float, ...]
    """By member, above 0: slots are handed out in proportion, as far as there are experts. Equal windows for layers of
    as many experts have equal weights; misses that were observed give those with more misses more slots."""

    def plan(self, slots: Sequence[int]) -> WindowPlan:
        return WindowPlan.of(self.experts, slots, self.row_bytes)


def bytes_of_everything(needs: Mapping[Layout, WindowNeeds]) -> int:
    """Device memory in which every expert has a slot; a share of the experts is a share of this."""
    return _nbytes(needs, {key: need.plan(need.experts) for key, need in needs.items()})


def plans_for_budget(needs: Mapping[Layout, WindowNeeds], budget_bytes: int, setting: str) -> dict[Layout, WindowPlan]:
    """The largest windows that ``budget_bytes`` pays for, per layout.

    Every layer first gets its minimum. Of the slots above it, the one that is its layer's ``k``-th comes in the order
    of ``k / weight``.

    Args:
        needs: by layout, or whatever stands for it.
        setting: what the user wrote, for the error.

    Raises:
        ConfigError: the budget does not pay for the minimum of every layer; names the smallest that does.
    """
    order = _order_of_slots(list(needs.values()))

    def plans(count: int) -> dict[Layout, WindowPlan]:
        """Those in which the first ``count`` slots above the minimum have been handed out."""
        minimum = np.array([least for need in needs.values() for least in need.minimum])
        slots = (minimum + np.bincount(order[:count], minlength=len(minimum))).tolist()
        found = {}
        for key, need in needs.items():
            found[key], slots = need.plan(slots[: len(need.experts)]), slots[len(need.experts) :]
        return found

    smallest = _nbytes(needs, plans(0))
    if budget_bytes < smallest:
        per_mille = -(-1000 * smallest // bytes_of_everything(needs))
        raise ConfigError(
            f"cache = {setting} gives {size_text(budget_bytes)} of device memory, too little to hold the experts of "
            f"one token of every layer; the smallest that works is '{size_setting(smallest)}' ({per_mille / 10:.1f}%)"
        )
    affordable = bisect_right(range(len(order) + 1), budget_bytes, key=lambda count: _nbytes(needs, plans(count))) - 1
    chosen = plans(affordable)
    assert _nbytes(needs, chosen) <= budget_bytes
    return chosen


def _order_of_slots(needs: Sequence[WindowNeeds]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The layers, numbered through all layouts, that get a slot above their minimum one after the other."""
    least, most, weights = (
        np.array([value for need in needs for value in values(need)])
        for values in (lambda need: need.minimum, lambda need: need.experts, lambda need: need.weights)
    )
    assert (least >= 1).all() and (least <= most).all() and (weights > 0).all()
    layers = np.repeat(np.arange(len(most)), most - least)
    numbers = np.concatenate([np.arange(few, many) for few, many in zip(least, most, strict=True)]) + 1
    return layers[np.argsort(numbers / weights[layers], kind="stable")]


def _nbytes(needs: Mapping[Layout, WindowNeeds], plans: Mapping[Layout, WindowPlan]) -> int:
    return sum(plan.nbytes(needs[key].row_bytes) for key, plan in plans.items())
