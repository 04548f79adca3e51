"""The folder of all stores: opens one, hands out the right to build one, and forgets those nobody needs.

Must never touch a folder whose builder is alive, nor remove anything it did not create.
"""

import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import manifest
from vllm_moe_offload.store.files import ROOT_SETTING, explained, named_path
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.lock import BuildLock
from vllm_moe_offload.store.manifest import OutdatedError
from vllm_moe_offload.store.reader import Store, UnusableStoreError
from vllm_moe_offload.store.writer import StoreWriter

logger = logging.getLogger(__name__)

REASON_NAME = "reason"
USED_NAME = "used"
"""A file whose time is that of a store's last opening."""
_ENTRY = re.compile(r"(?P<fingerprint>[0-9a-f]{32})(\.(?P<state>building|damaged|removed)-.+)?")


def default_root() -> Path:
    """$VLLM_MOE_OFFLOAD_STORE_ROOT, else vllm-moe-offload/stores in the user's cache folder."""
    if chosen := os.environ.get(ROOT_SETTING):
        return named_path(Path(chosen))
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vllm-moe-offload" / "stores"


@dataclass(frozen=True)
class StoreInfo:
    """One folder of the root; `size` in bytes, `built` and last `used` in seconds since the epoch.

    `state` is complete, building, leftover (of a killed build or a removal), damaged, outdated (of an earlier version
    of this package) or unreadable; `detail` says why. `superseded` by a newer store of the same model and settings.
    """

    path: Path
    fingerprint: str
    state: str
    size: int
    built: float
    used: float
    identity: StoreIdentity | None = None
    detail: str = ""
    superseded: bool = False

    @property
    def model(self) -> str:
        """The checkpoint's folder; empty if unknown."""
        return "" if self.identity is None else self.identity.model

    @property
    def orphaned(self) -> bool:
        """The checkpoint it was built from is no longer where it was; unknown, hence False, for a relative path or
        one that this user may not look at.
        """
        try:
            return Path(self.model).is_absolute() and not Path(self.model).exists()
        except OSError:
            return False

    @property
    def useless(self) -> bool:
        """No engine will read it again as things are."""
        return self.state in ("leftover", "damaged", "outdated") or self.orphaned

    def replaced_by(self, other: "StoreInfo") -> bool:
        """Whether `other` is newer and of the same model and settings."""
        if self.identity is None or other.identity is None or other.built <= self.built:
            return False
        return other.identity.could_replace(self.identity)


class StoreRoot:
    """All stores below `path` (default `default_root()`), each in a folder named by its fingerprint."""

    def __init__(self, path: Path | None = None):
        self.path = default_root() if path is None else named_path(path)

    def open_or_build(self, identity: StoreIdentity) -> Store | StoreWriter:
        """The store built for exactly `identity`, or a writer to build it, which then nobody else can.

        Blocks while another process builds it, and logs which one; also why what is there is not trusted. Raises
        StoreError if the root cannot be read or written.
        """
        final = self.path / identity.fingerprint
        store, _ = self._usable(final, identity)
        if store is not None:
            with suppress(OSError):  # another user's, or a read-only file system
                (final / USED_NAME).touch()
            return store
        with explained("build a store", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = BuildLock.acquire(
                self._lock_path(identity.fingerprint),
                lambda holder: logger.warning("store %s is being built by %s; waiting for it", final, holder),
            )
        try:
            store, problem = self._usable(final, identity)
            if store is None:
                if problem:
                    logger.warning("%s; building it again", problem)
                return self._start(final, identity, lock)
        except BaseException:
            lock.release()
            raise
        lock.release()
        return store

    def require_usable(self) -> None:
        """Make the root if there is none, and see that stores can be built in it, or that some are there to be read.

        Raises:
            StoreError: neither, as far as that is known without a store's identity.
        """
        with explained("build a store", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with tempfile.TemporaryFile(dir=self.path):
                    return
            except OSError:
                if not any(state is None for _, _, state in self._entries()):
                    raise

    def set_aside(self, store: Store, reason: str) -> None:
        """Make sure `store`, found damaged while open, is not trusted at the next start, which rebuilds it.

        `store` itself stays open and readable. Does nothing if another process did it already. Raises StoreError.
        """
        with explained("set a damaged store aside", self.path):
            try:
                there = (store.path / manifest.RECORDS_NAME).stat()
                if not os.path.samestat(there, os.fstat(store.fd)):
                    return
                aside = self._beside(store.path.name, "damaged")
                store.path.rename(aside)
            except FileNotFoundError:
                return
            (aside / REASON_NAME).write_text(reason + "\n")

    def ls(self) -> list[StoreInfo]:
        """Everything in the root that is ours, newest first."""
        with explained("list the stores", self.path):
            if not self.path.exists():
                return []
            infos = []
            for path, fingerprint, state in self._entries():
                with suppress(FileNotFoundError):  # renamed by its builder or removed meanwhile
                    infos.append(self._info(path, fingerprint, state))
        marked = [replace(info, superseded=any(info.replaced_by(other) for other in infos)) for info in infos]
        return sorted(marked, key=lambda info: -info.built)

    def prunable(
        self,
        everything: bool = False,
        superseded: bool = False,
        unused_for: float = math.inf,
        keep_bytes: float = math.inf,
    ) -> list[StoreInfo]:
        """Stores of no use, and those that were asked for; never one being built.

        Args:
            everything: all.
            superseded: also those a newer one of the same model and settings has taken the place of.
            unused_for: also those that no engine has opened for so many seconds.
            keep_bytes: also the ones longest unused, until the others together take no more than this.
        """
        infos = [info for info in self.ls() if info.state != "building"]
        now = time.time()
        chosen = [
            info
            for info in infos
            if everything or info.useless or (superseded and info.superseded) or now - info.used > unused_for
        ]
        kept = sorted((info for info in infos if info not in chosen), key=lambda info: info.used)
        excess = sum(info.size for info in kept) - keep_bytes
        for info in kept:
            if excess > 0:
                chosen.append(info)
                excess -= info.size
        return chosen

    def prune(self, infos: Iterable[StoreInfo]) -> tuple[int, list[str]]:
        """Remove these. Engines that have one open go on reading it.

        Returns the bytes freed, and why each of those that stay, another user's for example, could not be removed.
        """
        freed, problems = 0, []
        for info in infos:
            try:
                with explained("remove a store", info.path):
                    lock = BuildLock.try_acquire(self._lock_path(info.fingerprint))
                    if lock is None:
                        continue
                    try:
                        self._remove(info.path)
                        self._lock_path(info.fingerprint).unlink()
                    finally:
                        lock.release()
            except StoreError as problem:
                problems.append(str(problem))
            else:
                freed += info.size
        return freed, problems

    def _entries(self) -> list[tuple[Path, str, str | None]]:
        """Each folder of ours with its fingerprint and, unless it is a store in its place, what became of it."""
        matches = [(path, _ENTRY.fullmatch(path.name)) for path in self.path.iterdir() if path.is_dir()]
        return [(path, match["fingerprint"], match["state"]) for path, match in matches if match]

    def _usable(self, final: Path, identity: StoreIdentity) -> tuple[Store | None, str]:
        """The store, or None and what is wrong with what is there; nothing is wrong where there is nothing."""
        with explained("read the stores", self.path):
            if not final.exists():
                return None, ""
        try:
            return Store.open(final, identity), ""
        except UnusableStoreError as problem:
            return None, str(problem)

    def _start(self, final: Path, identity: StoreIdentity, lock: BuildLock) -> StoreWriter:
        """With the lock held, whatever else bears this fingerprint has no living owner."""
        with explained("build a store", self.path):
            for path, fingerprint, state in self._entries():
                if fingerprint == final.name:
                    # what another user's killed build left may have to stay; it is in nobody's way
                    with suppress(PermissionError) if state else nullcontext():
                        self._remove(path)
            building = self._beside(final.name, "building")
            building.mkdir()
        return StoreWriter(building, final, identity, lock)

    def _remove(self, path: Path) -> None:
        """Renamed first: a removal killed half-way must not leave something at a store's place."""
        doomed = self._beside(path.name.split(".")[0], "removed")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _beside(self, fingerprint: str, state: str) -> Path:
        return self.path / f"{fingerprint}.{state}-{os.getpid()}-{secrets.token_hex(4)}"

    def _lock_path(self, fingerprint: str) -> Path:
        return self.path / f"{fingerprint}.lock"

    def _info(self, path: Path, fingerprint: str, state: str | None) -> StoreInfo:
        built = path.stat().st_mtime
        try:
            times = {file.name: file.stat() for file in path.iterdir()}
        except PermissionError as error:
            return StoreInfo(path, fingerprint, "unreadable", 0, built, built, detail=f"{error.strerror}: {path}")
        if manifest.MANIFEST_NAME in times:  # the folder's own time changes with what is put beside
            built = times[manifest.MANIFEST_NAME].st_mtime
        identity, detail = None, ""
        if state is None:
            state, identity, detail = _inspect(path)
        elif state == "damaged":
            reason = path / REASON_NAME
            detail = reason.read_text().strip() if reason.exists() else ""
        elif state == "removed" or not BuildLock.held(self._lock_path(fingerprint)):
            state = "leftover"
        size = sum(status.st_size for status in times.values())
        used = times[USED_NAME].st_mtime if USED_NAME in times else built
        return StoreInfo(path, fingerprint, state, size, built, max(built, used), identity, detail)


def _inspect(path: Path) -> tuple[str, StoreIdentity | None, str]:
    """State, identity and detail of the store in folder `path`."""
    try:
        store = Store.open(path)
    except UnusableStoreError as problem:
        outdated = isinstance(problem.__cause__, OutdatedError)
        return "outdated" if outdated else "damaged", None, str(problem)
    except StoreError as problem:
        return "unreadable", None, str(problem)
    store.close()
    return "complete", store.identity, ""
