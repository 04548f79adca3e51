"""Whether offloading is worth it here, and why: from a plan's figures, nothing else."""

from enum import StrEnum
from typing import NamedTuple

from ..sizes import size_text

GOOD_SLOWDOWN, USABLE_SLOWDOWN, FUTILE_SLOWDOWN = 1.5, 3.0, 10.0
"""Times the TPOT with every expert in fast memory."""
SLOW_SECONDS = 0.5
"""Of TPOT: slower than people read, whatever it is compared with."""
FEW_EXPERTS = 4
"""A layer has few experts if a token uses more than one in so many."""


class Verdict(StrEnum):
    GOOD = "good"
    USABLE = "usable"
    SLOW = "slow"
    DO_NOT = "do not"


class Figures(NamedTuple):
    """What a verdict rests on."""

    fits_whole: bool
    """Plain vLLM can keep the model in fast memory."""
    slots: int
    """That fit; 0 where not even those of one token do."""
    room_bytes: int
    least_bytes: int
    """Of slots for one token."""
    experts: int
    """Per layer."""
    top_k: int
    share: float
    """Of all experts, those that get a slot."""
    tpot_seconds: float
    """With these slots, and with every expert in fast memory."""
    resident_seconds: float


def verdict(figures: Figures) -> tuple[Verdict, str]:
    """The verdict and its reason, a sentence for a person."""
    if figures.fits_whole:
        return Verdict.DO_NOT, "the whole model fits into fast memory anyway: serve it with plain vLLM"
    if not figures.slots:
        left = size_text(max(0, figures.room_bytes))
        return Verdict.DO_NOT, (
            f"dense weights, KV cache and vLLM itself leave {left} for slots, and those of one token take "
            f"{size_text(figures.least_bytes)}: lower --context or --concurrency, or give more --memory"
        )
    slowdown = figures.tpot_seconds / figures.resident_seconds
    compared = f"{slowdown:.1f} x the time per token of this machine if everything fitted"
    few = figures.experts < FEW_EXPERTS * figures.top_k
    if slowdown > FUTILE_SLOWDOWN or (few and slowdown > USABLE_SLOWDOWN):
        if few:
            why = f"few large experts: a token uses {figures.top_k} of {figures.experts} in every layer"
            return Verdict.DO_NOT, f"{why}, so that hardly any are there by chance; {compared}"
        return Verdict.DO_NOT, f"only {figures.share:.0%} of the experts get a slot; {compared}"
    if slowdown > USABLE_SLOWDOWN or figures.tpot_seconds > SLOW_SECONDS:
        return Verdict.SLOW, compared
    return (Verdict.GOOD if slowdown <= GOOD_SLOWDOWN else Verdict.USABLE), compared
