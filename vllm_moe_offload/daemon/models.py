"""All models of the daemon, sharing one budget: opened by name, grown and shrunk by need, forgotten for others.

It must never open a folder outside its root, and never let all of them together take more than the budget.
"""

import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, OffloadError, StoreError
from ..ipc.protocol import Attach, ModelStatus
from ..sizes import size_setting
from ..store.manifest import RECORDS_NAME
from ..store.reader import Store
from ..threads import ReportedThread
from .budget import Claim, split
from .model import DaemonModel
from .workers import Worker

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32}")
_LOOK_SECONDS = 5.0
"""How often the division is looked at."""
_PATIENCE_SECONDS = 20.0
"""How long a newcomer waits for others to give memory back."""
_NAP_SECONDS = 0.002
_WORTH_MOVING = 50
"""A model's share is changed for at least this part of the budget."""
_HALF_LIFE_SECONDS = 30.0

_File = tuple[int, int]
"""Device and inode of a store's records: a store built again is another one."""


class DaemonModels:
    """Thread-safe.

    Args:
        root: the folder of all stores.
        budget_bytes: memory for the experts of all models together.
        shares: what the operator allows at most, by store fingerprint or model name, in bytes.
        policy: name of the eviction policy.
        io_cpus: where reading threads may run; None leaves them where the daemon runs.
    """

    def __init__(
        self,
        root: Path,
        budget_bytes: int,
        shares: Mapping[str, int],
        policy: str,
        io_cpus: set[int] | None,
    ):
        self._root, self._budget, self._shares = root, budget_bytes, dict(shares)
        self._policy, self._io_cpus = policy, io_cpus
        self._models: dict[_File, DaemonModel] = {}
        self._dividing = threading.RLock()
        """Held while models come, go, or change size."""
        self._closing = threading.Event()
        self._looker = ReportedThread(target=self._look_after, name="moe-offload-budget", daemon=True)
        self._looker.start()

    def attach(self, request: Attach) -> Worker:
        """Let a worker use a model. Blocks: others may have to give memory back, a lease reads everything.

        Raises:
            OffloadError: it cannot be served; says why and what would help.
        """
        with self._dividing:
            file, model = self._open(request.store)
            try:
                leased = self._make_room(file, model, request)
                worker = model.attach(request, leased, lambda: self._with_same_experts(model, request.group))
            except BaseException:
                self._close_if_idle(file, model, keep=bool(model.held_bytes))
                raise
        if leased:
            try:
                worker.take_lease()
            except BaseException:
                worker.detach()
                raise
        if request.lease and not worker.leased:
            logger.warning(
                "an engine (pid %d) wanted all of %s in memory; %s of %s can be spared, it will read what it misses",
                request.pid,
                _name(model),
                size_setting(model.budget),
                size_setting(model.full_bytes),
            )
        return worker

    def status(self) -> list[ModelStatus]:
        return [model.status() for model in list(self._models.values())]

    def freeze(self) -> None:
        """The daemon ends: nothing that a worker reads changes any more, though its connection does."""
        for model in list(self._models.values()):
            for worker in list(model.workers.values()):
                worker.outlive()
            model.freeze()

    def close(self) -> None:
        """Everyone has been detached, or kept: close all stores."""
        self._closing.set()
        self._looker.join()
        with self._dividing:
            while self._models:
                self._models.popitem()[1].close()

    def _open(self, name: str) -> tuple[_File, DaemonModel]:
        if not _NAME.fullmatch(name):
            raise StoreError(f"store {name!r}: a store is named by its fingerprint, 32 hexadecimal digits")
        path = self._root / name
        try:
            status = (path / RECORDS_NAME).stat()
        except OSError as error:
            raise StoreError(
                f"the daemon has no store {name} in {self._root} ({error.strerror}); build it there, or start the "
                "daemon with the --store folder that the engines use"
            ) from error
        file = (status.st_dev, status.st_ino)
        if file not in self._models:
            store = Store.open(path)
            if store.identity.fingerprint != name:
                store.close()
                raise StoreError(
                    f"store {path} was built as {store.identity.fingerprint}; remove it and build it again"
                )
            self._models[file] = DaemonModel(store, self._policy, self._io_cpus)
        return file, self._models[file]

    def _make_room(self, file: _File, model: DaemonModel, request: Attach) -> bool:
        """Divide the budget anew with another worker of ``model``. Returns whether it is held whole for the worker."""
        claims = self._claims()
        wanted = max(model.wanted_bytes, request.wanted_bytes, 1)
        floor, ceiling = (
            max(claims[file].floor, model.least_bytes(request.wanted_bytes, request.least_slots)),
            claims[file].ceiling,
        )
        if floor > ceiling:
            raise ConfigError(
                f"--share {self._share_of(model)}: {size_setting(ceiling)} is too little for {_name(model)}; "
                f"the least that works is {size_setting(floor)}"
            )
        claims[file] = Claim(floor, ceiling, wanted, claims[file].held, model.pressure)
        others = sum(claim.floor for key, claim in claims.items() if key != file)
        if floor + others > self._budget:
            raise ConfigError(
                f"--cache {size_setting(self._budget)} of the daemon is too little for {_name(model)}: it needs at "
                f"least {size_setting(floor)}, and {size_setting(others)} are promised to {self._others(model)}; "
                f"the least that works is {size_setting(floor + others)}"
            )
        targets = split(claims, self._budget)
        leased = request.lease and targets[file] >= model.full_bytes
        self._resize(targets, _PATIENCE_SECONDS)
        least = model.full_bytes if leased else floor
        if model.budget < least:
            raise OffloadError(
                f"{self._others(model)} did not give back memory for {_name(model)} within {_PATIENCE_SECONDS:.0f} s; "
                "try again, or look for an engine that hangs"
            )
        return leased

    def _claims(self) -> dict[_File, Claim]:
        return {file: self._claim(model) for file, model in self._models.items()}

    def _claim(self, model: DaemonModel) -> Claim:
        ceiling = model.full_bytes
        if share := self._share_of(model):
            ceiling = min(ceiling, self._shares[share])
        wanted = model.wanted_bytes
        floor = model.full_bytes if model.leased else model.promised
        return Claim(floor, max(floor, ceiling), wanted, model.held_bytes, model.pressure)

    def _share_of(self, model: DaemonModel) -> str:
        """The name under which the operator has limited it."""
        path = Path(model.store.identity.model)
        hub = [part.removeprefix("models--").replace("--", "/") for part in path.parts if part.startswith("models--")]
        return next((name for name in (model.name, str(path), path.name, *hub) if name in self._shares), "")

    def _resize(self, targets: Mapping[_File, int], patience: float) -> None:
        """Shrink, wait until it has come about, and give others what is free then."""
        for file, target in targets.items():
            if target < self._models[file].budget:
                self._models[file].set_budget(target)
        held = self._held_when_shrunk(patience)
        taken = {file: max(model.budget, held[file]) for file, model in self._models.items()}
        for file, target in targets.items():
            free = self._budget - sum(taken.values())
            granted = min(target, taken[file] + max(0, free))
            if granted > self._models[file].budget:
                self._models[file].set_budget(granted)
                taken[file] = max(taken[file], granted)
        for file, model in list(self._models.items()):
            self._close_if_idle(file, model, keep=model.held_bytes > 0 or targets.get(file, 0) > 0)

    def _held_when_shrunk(self, patience: float) -> dict[_File, int]:
        """What the models hold as soon as none holds more than its budget, or at last.

        Pools that are contended for lend slots beyond their limits for moments, so a second look may see more again.
        """
        deadline = time.monotonic() + patience
        while True:
            held = {file: model.held_bytes for file, model in self._models.items()}
            within = all(held[file] <= model.budget for file, model in self._models.items())
            if within or time.monotonic() >= deadline:
                return held
            time.sleep(_NAP_SECONDS)

    def _close_if_idle(self, file: _File, model: DaemonModel, keep: bool) -> None:
        if not model.workers and not keep and self._models.pop(file, None) is not None:
            model.close()

    def _with_same_experts(self, model: DaemonModel, group: str) -> list[Worker]:
        """The workers of an engine that compute with other slices of the experts of ``model``."""
        if not group:
            return []
        return [
            worker
            for other in list(self._models.values())
            if other is not model
            for worker in list(other.workers.values())
            if worker.group == group and other.is_alike(model)
        ]

    def _look_after(self) -> None:
        """Move memory to where it is missed. Runs in a thread of its own."""
        missed: dict[_File, int] = {}
        complaint = ""
        while not self._closing.wait(_LOOK_SECONDS):
            try:
                with self._dividing:
                    self._measure_pressure(missed)
                    self.rebalance()
            except Exception as error:  # whatever it is, nobody else moves memory
                before, complaint = complaint, f"{type(error).__name__}: {error}"
                if complaint != before:
                    logger.error("the memory could not be divided anew; the daemon tries again: %s", complaint)

    def _measure_pressure(self, missed: dict[_File, int]) -> None:
        """``missed``: by model, the bytes missed until the last look; updated."""
        for file, model in self._models.items():
            now = model.missed_bytes
            rate = (now - missed.get(file, now)) / _LOOK_SECONDS
            missed[file] = now
            model.pressure += (rate - model.pressure) * (1 - 0.5 ** (_LOOK_SECONDS / _HALF_LIFE_SECONDS))

    def rebalance(self) -> None:
        """Go half of the way to what the models need now, if it is worth it."""
        with self._dividing:
            if len(self._models) < 2:
                return
            targets = split(self._claims(), self._budget)
            changes = {file: target - self._models[file].budget for file, target in targets.items()}
            if max(map(abs, changes.values())) * _WORTH_MOVING >= self._budget:
                half = {file: self._models[file].budget + change // 2 for file, change in changes.items()}
                self._resize(half, patience=1.0)

    def _others(self, model: DaemonModel) -> str:
        return ", ".join(_name(other) for other in self._models.values() if other is not model) or "nobody else"


def _name(model: DaemonModel) -> str:
    return f"{model.store.identity.model or 'the model'} (store {model.name})"
