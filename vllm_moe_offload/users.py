"""Which numbers the kernel shows for users and groups stand for one of them."""

from pathlib import Path
from typing import Literal

_ALL_NUMBERS = 2**32 - 1
_USUALLY_FOR_ALL_OTHERS = 65534


def is_known(number: int, kind: Literal["uid", "gid"]) -> bool:
    """Whether a number the kernel shows stands for one user or group: in a container with users of its own one number
    is shown for all that it does not have."""
    try:
        for_all_others = int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
        ranges = Path(f"/proc/self/{kind}_map").read_text().split()
    except OSError:
        return number != _USUALLY_FOR_ALL_OTHERS
    return number != for_all_others or sum(map(int, ranges[2::3])) >= _ALL_NUMBERS
