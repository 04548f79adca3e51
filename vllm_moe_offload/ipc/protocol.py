"""The messages between engines and the daemon, and their limits. Data only: it must never open, read or map anything.

Experts and slots travel as the bytes of little-endian int32 arrays. Experts are flat ids of one pool: the layers whose
records have one layout, in the order of the store, each taking as many ids as it has experts.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION = 2
"""Of this protocol and of the table in shared memory. Peers of another version are refused by name."""

MESSAGE_BYTES = 1 << 20
HISTORY_MESSAGE_BYTES = 64 << 20
"""That a message may have, and on a connection of role ``history``, where traces of whole requests travel."""

MAX_WORKERS = 64
"""Attached to one model at a time."""


class Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of everything on the wire."""


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First on every connection. ``role``: what will be asked on it.

    Fields added by later versions are let through, so that their version is what such peers are refused for.
    """

    version: int
    role: str
    """``worker``, ``history`` or ``control``."""


class Welcome(Message, frozen=True):
    version: int
    pid: int


class Refused(Message, frozen=True):
    """Whatever was asked is not going to happen; the reason is for a person."""

    reason: str


class Attach(Message, frozen=True):
    """An engine's worker wants to compute with the experts of a store."""

    store: str
    """Name of the store's folder: its fingerprint. The daemon looks for it under its own root."""
    pid: int
    wanted_bytes: int
    """Fast memory the worker was configured to use for experts."""
    lease: bool
    """Whether it needs every expert in the slot of its own number for as long as it is attached."""
    group: str
    """Ranks of one engine have one group; hints of one serve all."""
    rank: int
    least_slots: list[int] = []
    """Per pool, how many a single token needs; the daemon promises no fewer."""


class PoolInfo(msgspec.Struct, frozen=True):
    """One pool of an attached model; its arena and its table come as two file descriptors, in this order."""

    experts: int
    limit: int
    """Slots that may be occupied at present."""
    arena_bytes: int
    table_bytes: int


class Attached(Message, frozen=True):
    worker: int
    """The worker's entry in the tables, the same in every pool."""
    lease: bool
    pools: list[PoolInfo]


class Demand(Message, frozen=True):
    """The worker waits for ``experts``: everything the layer needs, present or not."""

    ticket: int
    """Rises by one. Its experts stay until the worker writes this number, or a later one, to ``done``."""
    pool: int
    experts: bytes
    stream: bool = False
    """A long prefill passes through: do not let it wipe out what decoding keeps."""


class FailedLoad(msgspec.Struct, frozen=True):
    expert: int
    reason: str
    damaged: bool
    """The record's bytes are wrong, as opposed to unreadable."""


class Supplied(Message, frozen=True):
    ticket: int
    slots: bytes
    """In the order asked; -1 for what has failed."""
    loaded: int
    """Records read for this demand."""
    joined: int
    """Records that were on their way already."""
    failed: list[FailedLoad] = []


class Hint(Message, frozen=True):
    """Experts that will probably be needed, best first. Has no reply."""

    pool: int
    experts: bytes
    stream: bool = False


class ImportSlots(Message, frozen=True):
    """Complete records in an older arena, whose descriptor comes along: they save reading if their checksums match."""

    pool: int
    experts: bytes
    slots: bytes


class SlotsImported(Message, frozen=True):
    records: int


class PackedTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whole requests with their expert maps, as ``trace.Trace`` has them.

    Each field is the bytes of a little-endian array. Shape and types follow from the history it is meant for.
    """

    lengths: bytes
    """int32 ``[R]``: tokens of each request, together T."""
    experts: bytes
    """``[T, L, K]``, uint8 where a layer has no more than 256 experts, else uint16."""
    weights: bytes
    """float16 ``[T, L, K]``."""
    tokens: bytes | None = None
    """int32 ``[T]``."""
    phase: bytes | None = None
    """uint8 ``[T]``."""
    embeddings: bytes | None = None
    """float16 ``[R, D]``."""


class OpenHistory(Message, frozen=True):
    """What follows on this connection is about the history of one model."""

    fingerprint: str
    """Of the model: 32 hexadecimal digits."""
    shape: tuple[int, int, int]
    """Layers, experts per layer, experts per token."""
    store: str
    """Whose status shows this history: the folder name of the store the worker has attached to."""


class HistorySize(msgspec.Struct, frozen=True):
    """Of what all engines of the model have left."""

    requests: int
    tokens: int


class HistoryOpened(Message, frozen=True):
    size: HistorySize
    folder: str | None
    """Where the daemon keeps it, and heads learned from it belong; None if it ends with the daemon."""


class Remember(Message, frozen=True):
    """A request has ended; its trace."""

    trace: PackedTrace
    maybe_duplicate: bool = False
    """It may be there already: the worker does not know whether an earlier daemon has saved it."""


class Remembered(Message, frozen=True):
    size: HistorySize


class Search(Message, frozen=True):
    """What resembles a request that has arrived."""

    embedding: bytes
    """float32 ``[D]``; empty to get the latest requests."""
    max_tokens: int


class Found(Message, frozen=True):
    trace: PackedTrace
    """Requests with near prompt embeddings, nearest first, then the latest; the last of each kind may be cut."""
    size: HistorySize


class GetStatus(Message, frozen=True):
    pass


class Stop(Message, frozen=True):
    pass


class Stopping(Message, frozen=True):
    pass


class WorkerStatus(msgspec.Struct, frozen=True):
    worker: int
    pid: int
    group: str
    rank: int
    lease: bool
    stats: dict[str, int | float]
    """The ``WORKER_STATISTICS`` by name, as the worker counts them."""


class ModelStatus(msgspec.Struct, frozen=True):
    store: str
    model: str
    stats: dict[str, int | float]
    """The ``MODEL_STATISTICS`` by name, since the model was first attached."""
    workers: list[WorkerStatus]


class StatusReport(Message, frozen=True):
    pid: int
    uptime_seconds: float
    budget_bytes: int
    models: list[ModelStatus]
    failed_threads: list[str]
    """Threads of the daemon that have ended by an exception: name and exception of each."""


Request = Hello | Attach | Demand | Hint | ImportSlots | OpenHistory | Remember | Search | GetStatus | Stop
Reply = (
    Welcome
    | Attached
    | Supplied
    | SlotsImported
    | HistoryOpened
    | Remembered
    | Found
    | StatusReport
    | Stopping
    | Refused
)


def pack_ids(ids: NDArray[np.integer]) -> bytes:
    """Experts or slots as they travel."""
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> NDArray[np.int32]:
    """The inverse of ``pack_ids``.

    Raises:
        ValueError: the bytes are no whole number of int32.
    """
    return np.frombuffer(data, dtype="<i4").astype(np.int32)
