"""Which pages larger than the machine's small ones the kernel gives: a disk writes them faster, piece by piece.

It must never change a setting.
"""

import re
from pathlib import Path

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
HUGE_PAGE_BYTES = 2 << 20
LARGE_PAGE_BYTES = 64 << 10
"""Pages of this size are read into about as fast as huge ones."""

_GIVEN = ("always", "within_size", "advise", "madvise", "force")


def private_huge_pages(settings: Path = SETTINGS) -> bool:
    """Whether private memory may have huge pages where it asks for them."""
    return _chosen(settings / "enabled") in _GIVEN


def shared_page_bytes(settings: Path = SETTINGS) -> int:
    """The smallest page of ``LARGE_PAGE_BYTES`` or more that shared memory may have where it asks for it; 0 if none."""
    everywhere = _chosen(settings / "shmem_enabled")
    if everywhere == "deny":
        return 0
    choices = {int(size): _chosen(settings / f"hugepages-{size}kB" / "shmem_enabled") for size in _sizes(settings)}
    if not any(choices.values()):  # a kernel that knows no sizes but the huge one
        choices = {HUGE_PAGE_BYTES >> 10: "inherit"}
    given = [
        size << 10 for size, choice in choices.items() if (everywhere if choice == "inherit" else choice) in _GIVEN
    ]
    return min((size for size in given if size >= LARGE_PAGE_BYTES), default=0)


def _sizes(settings: Path) -> list[str]:
    """In KiB."""
    names = (folder.name for folder in settings.glob("hugepages-*kB"))
    return [name.removeprefix("hugepages-").removesuffix("kB") for name in names]


def _chosen(setting: Path) -> str:
    """The word in brackets; empty if the kernel has no such setting."""
    try:
        word = re.search(r"\[([\w+]+)\]", setting.read_text())
    except OSError:
        return ""
    return word[1] if word else ""
