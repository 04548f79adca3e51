"""The folder of all stores: opens one, hands out the right to build one, and forgets those nobody needs.

Must never touch a folder whose builder is alive, nor remove anything it did not create.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import manifest
from vllm_moe_offload.store.files import ROOT_SETTING, explained
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.lock import BuildLock
from vllm_moe_offload.store.reader import Store, UnusableStoreError
from vllm_moe_offload.store.writer import StoreWriter

REASON_NAME = "reason"
_ENTRY = re.compile(r"(?P<fingerprint>[0-9a-f]{32})(\.(?P<state>building|damaged|removed)-.+)?")


def default_root() -> Path:
    """$VLLM_MOE_OFFLOAD_STORE_ROOT, else vllm-moe-offload/stores in the user's cache folder."""
    if chosen := os.environ.get(ROOT_SETTING):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vllm-moe-offload" / "stores"


@dataclass(frozen=True)
class StoreInfo:
    """One folder of the root; `size` in bytes, `built` in seconds since the epoch.

    `state` is complete, building, leftover (of a killed build or a removal), damaged or unreadable; `detail` says why.
    """

    path: Path
    fingerprint: str
    state: str
    size: int
    built: float
    model: str = ""
    detail: str = ""

    @property
    def orphaned(self) -> bool:
        """The checkpoint it was built from is no longer where it was; unknown, hence False, for a relative path."""
        return Path(self.model).is_absolute() and not Path(self.model).exists()


class StoreRoot:
    """All stores below `path` (default `default_root()`), each in a folder named by its fingerprint."""

    def __init__(self, path: Path | None = None):
        self.path = default_root() if path is None else path

    def open_or_build(self, identity: StoreIdentity, say: Callable[[str], None]) -> Store | StoreWriter:
        """The store built for exactly `identity`, or a writer to build it, which then nobody else can.

        Blocks while another process builds it. `say` hears why this takes long: who is building, or why what is
        there is not believed. Raises StoreError if the root cannot be read or written.
        """
        final = self.path / identity.fingerprint
        store = self._usable(final, identity, say=lambda reason: None)
        if store is not None:
            return store
        with explained("build a store", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = BuildLock.acquire(
                self._lock_path(identity.fingerprint),
                lambda holder: say(f"store {final} is being built by {holder}; waiting for it"),
            )
        try:
            store = self._usable(final, identity, say)
            if store is None:
                return self._start(final, identity, lock)
        except BaseException:
            lock.release()
            raise
        lock.release()
        return store

    def set_aside(self, store: Store, reason: str) -> None:
        """Make sure `store`, found damaged while open, is not believed at the next start, which rebuilds it.

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
        return sorted(infos, key=lambda info: -info.built)

    def prunable(self, everything: bool = False) -> list[StoreInfo]:
        """Leftovers, damaged stores and those whose checkpoint is gone, or all; never one being built."""
        return [
            info
            for info in self.ls()
            if info.state != "building" and (everything or info.state in ("leftover", "damaged") or info.orphaned)
        ]

    def prune(self, infos: Iterable[StoreInfo]) -> int:
        """Remove these; returns the bytes freed. Engines that have one open go on reading it. Raises StoreError."""
        freed = 0
        for info in infos:
            with explained("remove a store", info.path):
                lock = BuildLock.try_acquire(self._lock_path(info.fingerprint))
                if lock is None:
                    continue
                try:
                    self._remove(info.path)
                    self._lock_path(info.fingerprint).unlink()
                finally:
                    lock.release()
            freed += info.size
        return freed

    def _entries(self) -> list[tuple[Path, str, str | None]]:
        """Each folder of ours with its fingerprint and, unless it is a store in its place, what became of it."""
        matches = [(path, _ENTRY.fullmatch(path.name)) for path in self.path.iterdir() if path.is_dir()]
        return [(path, match["fingerprint"], match["state"]) for path, match in matches if match]

    def _usable(self, final: Path, identity: StoreIdentity, say: Callable[[str], None]) -> Store | None:
        with explained("read the stores", self.path):
            if not final.exists():
                return None
        try:
            return Store.open(final, identity)
        except UnusableStoreError as problem:
            say(f"{problem}; building it again")
            return None

    def _start(self, final: Path, identity: StoreIdentity, lock: BuildLock) -> StoreWriter:
        """With the lock held, whatever else bears this fingerprint has no living owner."""
        with explained("build a store", self.path):
            for path, fingerprint, _ in self._entries():
                if fingerprint == final.name:
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
        size = sum(file.stat().st_size for file in path.iterdir())
        model, detail = "", ""
        if state is None:
            state, model, detail = _inspect(path)
        elif state == "damaged":
            reason = path / REASON_NAME
            detail = reason.read_text().strip() if reason.exists() else ""
        elif state == "removed" or self._unlocked(fingerprint):
            state = "leftover"
        return StoreInfo(path, fingerprint, state, size, path.stat().st_mtime, model, detail)

    def _unlocked(self, fingerprint: str) -> bool:
        lock = BuildLock.try_acquire(self._lock_path(fingerprint))
        if lock is not None:
            lock.release()
        return lock is not None


def _inspect(path: Path) -> tuple[str, str, str]:
    """State, model and detail of the store in folder `path`."""
    try:
        store = Store.open(path)
    except UnusableStoreError as problem:
        return "damaged", "", str(problem)
    except StoreError as problem:
        return "unreadable", "", str(problem)
    store.close()
    return "complete", store.identity.model, ""
