"""One attached worker's door to its model. Whatever comes through it is checked before it is believed."""

import os
from collections.abc import Callable, Iterable

from ..prefetch.loader import DamagedRecordError
from .adoption import adopt
from .hosted_model import HostedModel
from .protocol import Adopt, Adopted, Attached, Demand, FailedLoad, Hint, Supplied, pack_ids, unpack_ids


class Attachment:
    """Its methods are called from the thread of the worker's connection.

    A ``ValueError`` from any of them means that the message made no sense.

    Args:
        siblings: the attached workers of the same engine, this one included.
        left: told once, when the worker has been detached.
    """

    def __init__(
        self,
        model: HostedModel,
        worker: int,
        leased: bool,
        siblings: Callable[[], Iterable["Attachment"]],
        left: Callable[["Attachment"], None],
    ):
        self.model = model
        self.worker = worker
        self.group = model.workers[worker].group
        self.reply = Attached(worker, leased, model.pool_infos())
        self.fds = model.fds
        """Arena and table of every pool, to be sent with ``reply``; they stay the model's."""
        self._siblings = siblings
        self._left = left
        self._attached = True

    def demand(self, request: Demand) -> Supplied:
        """Blocks while records are read.

        Raises:
            ValueError: it makes no sense.
            LoadError: other workers did not make room in time.
        """
        pool = self.model.pool(request.pool)
        supply = pool.demand(self.worker, request.ticket, unpack_ids(request.experts), request.stream)
        failed = [
            FailedLoad(expert, str(error), isinstance(error, DamagedRecordError)) for expert, error in supply.failed
        ]
        return Supplied(request.ticket, pack_ids(supply.slots), supply.loaded, supply.joined, failed)

    def hint(self, request: Hint) -> None:
        """Returns without waiting for anything to be read. The engine's other ranks will need the same.

        Raises:
            ValueError: it makes no sense.
        """
        experts = unpack_ids(request.experts)
        self.model.pool(request.pool).hint(self.worker, experts, request.stream)
        for other in self._siblings():
            if other.model is not self.model and other.model.is_alike(self.model):
                other.model.pools[request.pool].hint(other.worker, experts, request.stream)

    def adopt(self, request: Adopt, fd: int) -> Adopted:
        """Take over ``fd``, an older arena, and from it what is right and absent here.

        Raises:
            ValueError: it makes no sense.
        """
        try:
            pool = self.model.pool(request.pool)
            experts, slots = unpack_ids(request.experts), unpack_ids(request.slots)
        except ValueError:
            os.close(fd)
            raise
        return Adopted(adopt(pool, self.model.store, fd, experts, slots))

    def keep(self) -> None:
        """The daemon ends before the worker does: what it reads must stay for as long as there is a daemon."""
        self._attached = False

    def detach(self) -> None:
        """The worker has left, or died. Idempotent."""
        if self._attached:
            self._attached = False
            self.model.detach(self.worker)
            self._left(self)
