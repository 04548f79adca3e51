"""How much host memory this process may still take, its control groups included."""

from pathlib import Path

import psutil

_LIMITS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
)


def available_bytes() -> int:
    """Bytes that can be taken without swapping or being killed: the machine's, or the tightest control group's."""
    return min([psutil.virtual_memory().available, *_room_in_groups()])


def _room_in_groups() -> list[int]:
    """Room left in every memory control group (v1 and v2) this process is in; reclaimable cache counts as room."""
    rooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, limit_name, usage_name, cache_name = _LIMITS[0 if controllers else 1]
        for group in (Path(base + path), *Path(base + path).parents):
            room = _room(group, limit_name, usage_name, cache_name)
            if room is not None:
                rooms.append(room)
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
