"""How much host memory may still be taken: what bounds it, and one process's part of what several share."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_LIMITS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
)
_RECLAIMABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")

Limits = Mapping[str, int]
"""Bytes that each bound on a process leaves free. Processes that name the same bound take from the same memory."""


def memory_limits() -> Limits:
    """What bounds this process: the machine, its memory control groups, and NUMA nodes its memory is bound to."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    limits = {"machine": psutil.virtual_memory().available, **_room_in_groups(), **_room_on_nodes()}
    return {f"{machine} {name}": room for name, room in limits.items()}


def equal_share(limits: Sequence[Limits], process: int) -> int:
    """Bytes that ``process`` may take so that all processes can take as much as each other without exceeding a bound.

    Args:
        limits: what every process saw, all before any of them started to fill what it takes.
        process: index of the one that asks.
    """
    return min(_part_of(name, limits) for name in limits[process])


def _part_of(name: str, limits: Sequence[Limits]) -> int:
    seen = [those[name] for those in limits if name in those]
    return min(seen) // len(seen)


def _room_in_groups() -> dict[str, int]:
    """Room left in every memory control group (v1 and v2) this process is in; reclaimable cache counts as room."""
    rooms = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, limit_name, usage_name, cache_name = _LIMITS[0 if controllers else 1]
        for group in (Path(base + path), *Path(base + path).parents):
            room = _room(group, limit_name, usage_name, cache_name)
            if room is not None:
                # Containers see their own group under the same path as others see theirs; its inode tells them apart.
                rooms[f"cgroup {group.stat().st_ino}"] = room
    return rooms


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not limit.isdigit():
        return None
    return int(limit) - usage + int(statistics.get(cache_name, 0))


def _room_on_nodes() -> dict[str, int]:
    """Room on the NUMA nodes that memory of this process must come from; vLLM binds every CPU worker to one."""
    try:
        return room_on_nodes(Path("/proc/self/numa_maps").read_text(), Path("/sys/devices/system/node"))
    except (FileNotFoundError, PermissionError):
        return {}


def room_on_nodes(numa_maps: str, nodes: Path) -> dict[str, int]:
    """Room on the nodes a process is bound to by its memory policy; nothing where that is every node with memory.

    Args:
        numa_maps: of the process, as the kernel writes it.
        nodes: the kernel's folder of nodes.
    """
    policy = re.search(r"^\S+ bind:(\S+) stack", numa_maps, re.MULTILINE)
    if policy is None:
        return {}
    bound = _numbers(policy[1])
    if bound >= _numbers((nodes / "has_memory").read_text().strip()):
        return {}
    return {f"nodes {policy[1]}": sum(_free_on(nodes / f"node{node}") for node in bound)}


def _free_on(node: Path) -> int:
    lines = map(str.split, (node / "meminfo").read_text().splitlines())
    kilobytes = {words[2].rstrip(":"): int(words[3]) for words in lines}
    return 1024 * sum(kilobytes[name] for name in _RECLAIMABLE)


def _numbers(ranges: str) -> set[int]:
    """``0,2-3`` as 0, 2, 3."""
    numbers: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
