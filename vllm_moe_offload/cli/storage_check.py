"""What `doctor` says of the folders of stores and histories, and how fast they are. It must leave nothing behind."""

import os
import pwd
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import OffloadError
from ..sizes import size_text
from ..store import StoreInfo, StoreRoot
from ..store.direct import open_direct
from ..store.files import ROOT_SETTING, free_bytes
from ..store.layout import ALIGNMENT
from ..trace.archive import HistoryArchive
from .bandwidth import COPIED_BYTES, COPIES, FILE_BYTES, READS_AT_ONCE, disk_rate, memory_rate
from .check import OK, PROBLEM, WARNING, Check
from .progress import progress_bar

_LITTLE_SPACE = 10 << 30
_SLOW_DISK = 500e6
"""Bytes per second. A model with experts of 10 MiB that misses 8 of them per token then stalls 160 ms on each."""


def check_store_root(root: Path) -> Iterator[Check]:
    """Can stores be built and read quickly there? Tried with a file that is gone afterwards."""
    subject, place = "store root", _existing(root)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            fd, direct = open_direct(Path(folder) / "probe", os.O_CREAT | os.O_WRONLY)
            os.close(fd)
    except OSError as error:
        detail = f"{root} cannot be written ({error.strerror})"
        yield Check(subject, PROBLEM, detail, f"set {ROOT_SETTING} to a folder this user can write")
        return
    free = free_bytes(place)
    more = f"free some, or set {ROOT_SETTING} to a larger disk" if free < _LITTLE_SPACE else ""
    yield Check(subject, WARNING if more else OK, f"{root}, {size_text(free)} free", more)
    if direct:
        yield Check("O_DIRECT", OK, f"in blocks of {ALIGNMENT} bytes")
    else:
        slower = "not with this file system: reads go through the page cache"
        yield Check("O_DIRECT", WARNING, slower, f"set {ROOT_SETTING} to a local disk")


def check_rates(root: Path) -> Iterator[Check]:
    """What the disk of the stores and this machine's memory give, measured for some seconds."""
    place, threads = _existing(root), len(os.sched_getaffinity(0))
    yield _check_disk_rate(place)
    with progress_bar("measuring memory", COPIES * COPIED_BYTES * threads, in_bytes=True) as bar:
        rate = memory_rate(threads, bar.advance)
    yield Check("memory bandwidth", OK, f"{rate / 1e9:.1f} GB/s read and written by copies on {threads} threads")


def _check_disk_rate(place: Path) -> Check:
    subject, needed = "disk bandwidth", 2 * FILE_BYTES
    if free_bytes(place) < needed:
        return Check(subject, WARNING, "not measured", f"free {size_text(needed)} in {place}")
    try:
        with progress_bar("measuring the disk", needed, in_bytes=True) as bar:
            rate = disk_rate(place, bar.advance)
    except OSError as error:
        return Check(subject, WARNING, f"not measured ({error.strerror})", f"see that {place} can be written")
    detail = f"{rate / 1e9:.2f} GB/s, {READS_AT_ONCE} reads at a time"
    if rate < _SLOW_DISK:
        return Check(subject, WARNING, f"{detail}: tokens wait long for experts", f"set {ROOT_SETTING} to an NVMe disk")
    return Check(subject, OK, detail)


def check_stores(root: Path) -> Iterator[Check]:
    """Whether the stores that are there are sound, and whose they are."""
    subject = "stores"
    if not root.exists():
        yield Check(subject, OK, f"none in {root} yet")
        return
    yield _check_owner("store folder", root, stat.S_IWOTH, "everyone can put files there", "chmod o-w")
    try:
        infos = StoreRoot(root).ls()
    except OffloadError as error:
        yield Check(subject, PROBLEM, str(error), f"set {ROOT_SETTING} to a folder this user can read")
        return
    yield _check_states(subject, infos)


def _check_states(subject: str, infos: list[StoreInfo]) -> Check:
    size = size_text(sum(info.size for info in infos))
    states = Counter(f"{info.state}, checkpoint gone" if info.orphaned else info.state for info in infos)
    detail = f"{len(infos)}, {size}"
    if any(info.useless or info.state == "unreadable" for info in infos):
        found = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        return Check(subject, WARNING, f"{detail} ({found})", "see `store ls`; `store prune` removes those of no use")
    return Check(subject, OK, detail)


def check_history(folder: Path) -> Iterator[Check]:
    """Whether histories can be kept in ``folder``, and only their user can read them."""
    subject = "history"
    if not folder.exists():
        yield Check(subject, OK, f"none in {folder} yet")
        return
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        detail = f"{folder} cannot be written: nothing is remembered"
        yield Check(subject, WARNING, detail, "grant access to it, or give --moe-offload-history another folder")
        return
    entries = list(HistoryArchive(folder).entries())
    detail = f"{len(entries)} in {folder}, {size_text(sum(entry.nbytes for entry in entries))}"
    aside = list(folder.glob("*/*.unusable-*"))
    if aside:
        what = f"{detail}; {len(aside)} set aside as unusable"
        yield Check(subject, WARNING, what, "see `history ls`; `history prune FINGERPRINT --keep 0` removes one")
    else:
        yield Check(subject, OK, detail)
    for entry in entries:
        others = stat.S_IRWXG | stat.S_IRWXO
        found = _check_owner("history folder", entry.path.parent, others, "others can read what was asked", "chmod 700")
        if found.state != OK:
            yield found


def _check_owner(subject: str, path: Path, refused: int, why: str, remedy: str) -> Check:
    """``refused``: bits of the mode that should not be set."""
    status = path.stat()
    mode, owner = stat.S_IMODE(status.st_mode), _user(status.st_uid)
    detail = f"{path} belongs to {owner}, mode {mode:o}"
    if mode & refused:
        return Check(subject, WARNING, f"{detail}: {why}", f"{remedy} {path}")
    return Check(subject, OK, detail)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
