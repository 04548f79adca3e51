"""What the ratios of a comparison say, in sentences, also where they speak against offloading. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .arms import Arm
from .summary import Spread, summarize

_NOISE = 0.03
"""A median ratio nearer to 1 is called equal, and one whose rounds lie on both sides of 1 is called undecided."""


def verdicts(
    batch: int, rounds: Sequence[dict[str, dict[str, Any]]], arms: Sequence[Arm], reference: str
) -> Iterator[str]:
    """One sentence for each arm against ``reference``, and for each pair that differs in prediction alone."""
    measured = summarize(list(rounds), {arm.name: reference for arm in arms})
    for arm in arms:
        entry = measured.get(arm.name, {})
        if arm.offloads and arm.name != reference and "tpot_ratio" in entry:
            differs = "" if entry["same_tokens"] else "; ITS TOKENS DIFFER"
            yield f"batch {batch}: {arm.name}: {in_words(entry['tpot_ratio'])} than {reference}{differs}"
    pairs = {arm.name: arm.without_prediction for arm in arms if arm.without_prediction not in ("", arm.name)}
    yield from _of_prediction(batch, summarize(list(rounds), pairs), pairs)


def _of_prediction(batch: int, measured: Mapping[str, Any], pairs: Mapping[str, str]) -> Iterator[str]:
    for name in pairs:
        if "tpot_ratio" in measured.get(name, {}):
            budget = name.partition(",")[0]
            yield f"batch {batch}: prediction at {budget}: {in_words(measured[name]['tpot_ratio'])} than without it"


def in_words(ratio: Spread) -> str:
    """``ratio`` of times, so that it is followed by "than" and what it is to."""
    figures = f"{ratio.median:.2f} x the time per token ({ratio.low:.2f}-{ratio.high:.2f})"
    if abs(ratio.median - 1) < _NOISE or ratio.low < 1 < ratio.high:
        return f"neither faster nor slower beyond the noise, {figures},"
    return f"{'SLOWER' if ratio.median > 1 else 'faster'}, {figures},"
