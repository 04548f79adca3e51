"""What the rates of a GPU mean, in words."""

from collections.abc import Iterator
from typing import Any

from ..sizes import size_text
from .check import OK, WARNING, Check

_GATHER_SHARE = 0.9
_HIDDEN_SHARE = 0.8


def judge_rates(rates: dict[str, Any]) -> Iterator[Check]:
    """``rates`` is what ``integration.selftest.measure`` found, its keys as JSON has them."""
    subject = "registration"
    if "refused" in rates:
        yield Check(subject, WARNING, f"refused ({rates['refused']}): the host copies every record", "see `doctor`")
        return
    yield Check(subject, OK, f"{rates['registration_seconds_per_gib']:.2f} s for a GiB of host memory")
    alone, together = rates["copies_alone"], rates["copies_together"]
    by_size = ", ".join(f"{size_text(int(size))} {_gb(alone[size])} / {_gb(together[size])}" for size in alone)
    yield Check("copies to the GPU, GB/s", OK, f"one / many at a time: {by_size}")
    yield _judge_gather(rates["gather"], max(together.values()))
    yield _judge_overlap(rates["hidden"])


def _judge_gather(gather: dict[str, float], link: float) -> Check:
    subject = "loads by the GPU itself, GB/s"
    by_programs = ", ".join(f"{programs}: {_gb(rate)}" for programs, rate in gather.items())
    share = max(gather.values()) / link
    what = f"by programs {by_programs}; {share:.0%} of what copies reach"
    if share < _GATHER_SHARE:
        return Check(subject, WARNING, f"{what}: device-managed loads are slower than this link allows")
    return Check(subject, OK, what)


def _judge_overlap(hidden: float) -> Check:
    subject, what = "loads beside kernels", f"{hidden:.0%} of the shorter one's time is hidden"
    if hidden < _HIDDEN_SHARE:
        return Check(subject, WARNING, f"{what}: loading ahead gains little here")
    return Check(subject, OK, what)


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.1f}"
