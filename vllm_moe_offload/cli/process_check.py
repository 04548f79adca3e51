"""What `doctor` says of limits and environment variables that engines inherit. It changes nothing."""

import ctypes
import os
import resource
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..pool.memory_limits import memory_limits
from ..sizes import size_text
from .check import OK, PROBLEM, WARNING, Check

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_LITTLE_SHARED_MEMORY = 256 << 20
_OPENMP = {"libgomp": "GNU", "libiomp": "Intel", "libomp": "LLVM"}


def check_free_memory() -> Check:
    """What engines may still take, and of what."""
    limits = {name.partition(" ")[2]: room for name, room in memory_limits().items()}
    bound = min(limits, key=limits.__getitem__)
    return Check("free memory", OK, f"{size_text(limits[bound])}, bounded by the {bound}")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Ranks of an engine exchange batches there, and every worker what it reports."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return Check(str(folder), PROBLEM, f"cannot be used ({error.strerror})", f"mount a tmpfs at {folder}")
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    detail = f"{size_text(size)}, {size_text(free)} free"
    if free < _LITTLE_SHARED_MEMORY:
        remedy = "in a container, --ipc=host or --shm-size=2g; else remove what is left there"
        return Check(str(folder), WARNING, f"{detail}: engines of several ranks need more", remedy)
    return Check(str(folder), OK, detail)


def lock_limit() -> str:
    """How much memory this process may lock, in words."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "no limit on locked memory" if soft == resource.RLIM_INFINITY else f"locked memory up to {size_text(soft)}"


def check_locks() -> Check:
    """Only host memory that a GPU reads is locked; whether it can be is tried where there is a GPU."""
    return Check("memory locks", OK, f"{lock_limit()} (ulimit -l); only what a GPU reads is locked")


def check_openmp_binding(environment: Mapping[str, str], allowed: Collection[int]) -> Check:
    """To which processors vLLM binds its compute threads on a CPU. ``allowed`` are those this process may use."""
    subject, asked = "OpenMP binding", environment.get(BINDING, "auto")
    there = f"{len(allowed)} of {os.cpu_count()} processors may be used"
    if asked == "auto":
        return Check(subject, OK, f"vLLM binds compute threads by itself; {there}")
    if asked == "nobind":
        return Check(subject, WARNING, f"{BINDING}=nobind: compute threads move about", f"unset {BINDING}")
    try:
        wanted = {cpu for ranks in asked.split("|") for cpu in _processors(ranks)}
    except ValueError:
        remedy = f"unset {BINDING}, or give a list for each rank, as in '0-3|4-7'"
        return Check(subject, PROBLEM, f"{BINDING}={asked!r} is no list of processors", remedy)
    if missing := wanted - set(allowed):
        detail = f"{BINDING}={asked!r} names processors this process may not use: {sorted(missing)[:8]}"
        return Check(subject, WARNING, detail, f"unset {BINDING}, or name some of {sorted(allowed)[:8]}")
    return Check(subject, OK, f"{BINDING}={asked!r}; {there}")


def _processors(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        yield from range(int(first), int(last if dash else first) + 1)


def check_preloads(preloaded: str) -> Iterator[Check]:
    """``preloaded`` is what ``LD_PRELOAD`` holds."""
    subject, libraries = "preloaded libraries", preloaded.replace(":", " ").split()
    missing = [library for library in libraries if not _is_there(library)]
    if missing:
        yield Check(subject, WARNING, f"not found, so ignored: {', '.join(missing)}", "correct LD_PRELOAD")
    openmp = sorted({make for name, make in _OPENMP.items() if any(name in Path(each).name for each in libraries)})
    if len(openmp) > 1:
        detail = f"OpenMP of {' and '.join(openmp)} at once: vLLM does not start"
        yield Check(subject, PROBLEM, detail, "keep one of them in LD_PRELOAD")
    elif not missing:
        yield Check(subject, OK, ", ".join(libraries) or "none; vLLM adds its own")


def _is_there(library: str) -> bool:
    if "/" in library:
        return Path(library).exists()
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
