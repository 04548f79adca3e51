"""What one worker reports of one of its models."""

from bisect import bisect_left
from collections.abc import Sequence
from enum import IntEnum, StrEnum

import msgspec

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Role(StrEnum):
    TARGET = "target"
    """The model whose tokens are served."""
    DRAFTER = "drafter"
    """One that drafts for it."""


class Prediction(StrEnum):
    ON = "on"
    PAUSED = "paused"
    """Predicting has cost more time than it has saved; it is tried again later."""
    OFF = "off"


class Residency(IntEnum):
    """What is known of an expert in ``ExpertMap.resident``."""

    ABSENT = 0
    RESIDENT = 1
    PINNED = 2
    """In a slot that cannot be given away now."""


class Histogram(msgspec.Struct):
    """Of seconds. ``counts[i]`` are those above ``bounds[i - 1]`` and up to ``bounds[i]``; the last, the rest."""

    bounds: list[float]
    counts: list[int]
    sum: float = 0.0

    @classmethod
    def empty(cls, bounds: Sequence[float]) -> "Histogram":
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


class ExpertMap(msgspec.Struct):
    """Per layer and expert. Arrays are ``[len(layers), experts]``, rows of layers with fewer experts end with zeros.

    Experts are numbered as in the worker: of those that it holds, where ranks share out the experts of a layer.
    """

    layers: list[str]
    experts: int
    """The most of any layer."""
    resident: bytes
    """uint8, see ``Residency``; empty where a device decides and the host does not know."""
    uses: bytes
    """float32: steps that used the expert, each counting half after a minute."""
    hits: list[int]
    """Per layer, since the start, as the next two."""
    misses: list[int]
    stall_seconds: list[float]


class RequestReport(msgspec.Struct):
    """What a request has been through. Everything is of the steps it took part in, which it shares with others."""

    id: str
    """vLLM's."""
    running: bool
    steps: int = 0
    tokens: int = 0
    """Its own that were scheduled."""
    experts: int = 0
    """Needed, once per layer and step."""
    misses: int = 0
    stall_seconds: float = 0.0


class WorkerReport(msgspec.Struct):
    """One model of one worker, since the engine started."""

    engine: str
    """The same in all processes of an engine, and no other engine's."""
    model: str
    """Name of its checkpoint."""
    served_model: str
    """Name under which the engine serves; of a drafter, that of the model it drafts for."""
    role: Role
    pid: int
    replica: int
    """Number among the engine's data-parallel replicas: what vLLM's metrics call ``engine``."""
    rank: int
    """Of the worker within its replica."""
    started: float
    """Seconds since 1970, as ``time``."""
    time: float
    """Of this report."""
    stats: dict[str, int | float]
    """By their names in ``stats.Stats``; all that workers count."""
    step_stalls: Histogram
    """How long each step waited for loads."""
    request_stalls: Histogram
    """The same of requests that have ended, over all their steps."""
    experts: ExpertMap
    predictor: str
    prediction: Prediction
    prediction_reason: str
    """Why it is not on; else empty."""
    requests: list[RequestReport]
    """Running ones, then those that ended last, the latest first."""
    daemon_pid: int | None = None
    """Of the daemon that keeps its slots, 0 while it is away; None where the worker keeps its own."""
