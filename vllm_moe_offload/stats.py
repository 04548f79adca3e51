"""Every statistic, declared once: what it says, in which unit, and who counts it.

The log line, the RPC, the daemon's shared table, its status and Prometheus are generated from these declarations. To
add a statistic, declare it in ``Stats`` and count it where it happens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Flag, auto
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from .load_report import LoadReport

Number = int | float


class Source(Flag):
    """Who counts a statistic."""

    WORKER = auto()
    """An engine's worker, for itself."""
    DAEMON = auto()
    """The daemon, for a model and all workers attached to it."""


WORKER, DAEMON = Source.WORKER, Source.DAEMON


class Part(NamedTuple):
    """Of a metric of Prometheus that several statistics are together."""

    metric: str
    help: str
    labels: Mapping[str, str]
    """What tells this statistic from the others."""


@dataclass(frozen=True)
class Statistic:
    name: str
    """In ``Stats``, the RPC, the daemon's status and, behind a prefix, Prometheus."""
    help: str
    unit: str
    kind: Literal["counter", "gauge"]
    """A counter only grows, and those of several workers add up; a gauge is what is true now."""
    source: Source
    column: str
    """Heading in ``daemon status`` and ``daemon top``, among models if the daemon counts it, else among workers. Empty:
    it is only in ``daemon status --json``."""
    phrase: str
    """Follows the number in vLLM's log. Empty: it is not in the log."""
    part: Part | None = None
    """Of which metric of Prometheus it is a part; else it is one of its own, under its name."""

    @property
    def is_fraction(self) -> bool:
        """Whether it is not counted in whole numbers."""
        return self.unit in _FRACTIONS

    def to_word(self, value: Number) -> int:
        """As it lies in shared memory: seconds as microseconds, other fractions as millionths."""
        return round(value * 1e6) if self.is_fraction else int(value)

    def from_word(self, word: int) -> Number:
        return word / 1e6 if self.is_fraction else word


_FRACTIONS = ("seconds", "probability")


def _counter(
    help: str, unit: str, source: Source, *, column: str = "", phrase: str = "", part: Part | None = None
) -> Any:
    return _declare(help, unit, "counter", source, column, phrase, part)


def _gauge(help: str, unit: str, source: Source, *, column: str = "", phrase: str = "") -> Any:
    return _declare(help, unit, "gauge", source, column, phrase, None)


def _declare(help: str, unit: str, kind: str, source: Source, column: str, phrase: str, part: Part | None) -> Any:
    declaration = {
        "help": help,
        "unit": unit,
        "kind": kind,
        "source": source,
        "column": column,
        "phrase": phrase,
        "part": part,
    }
    return field(default=0.0 if unit in _FRACTIONS else 0, metadata=declaration)


def _moved(tier: str, reason: str) -> Part:
    return Part("moved_bytes", "Bytes of records moved to a tier of memory, and why.", {"tier": tier, "reason": reason})


@dataclass(slots=True)
class Stats:
    """The numbers of one worker, or of one of the daemon's pools. Whoever does a thing adds to its own."""

    hits: int = _counter("Experts a layer needed and found in a slot.", "experts", WORKER, column="hits")
    misses: int = _counter("Experts a layer needed and had to wait for.", "experts", WORKER, column="misses")
    host_hits: int = _counter(
        "Of the misses of slots in device memory, experts found in host memory; the others were read from disk.",
        "experts",
        WORKER,
    )
    copied_bytes: int = _counter("Bytes of records copied from host memory to the device.", "bytes", WORKER)
    demands: int = _counter("Times a worker waited for experts.", "demands", DAEMON)
    joined: int = _counter(
        "Demanded experts that were being loaded already, for another worker or on a prediction.",
        "experts",
        DAEMON,
        column="joined",
    )
    missed_bytes: int = _counter("Bytes of the records that workers waited for.", "bytes", DAEMON)
    loads: int = _counter("Records read.", "experts", WORKER | DAEMON, column="loads")
    loaded_bytes: int = _counter("Bytes of the records read.", "bytes", WORKER | DAEMON, phrase="loaded")
    demanded_bytes: int = _counter(
        "Bytes of records read from disk that forward passes waited for.",
        "bytes",
        WORKER | DAEMON,
        part=_moved("host", "demand"),
    )
    prefetched_bytes: int = _counter(
        "Bytes of records read from disk on a prediction.",
        "bytes",
        WORKER | DAEMON,
        part=_moved("host", "prefetch"),
    )
    streamed_bytes: int = _counter(
        "Bytes of records read from disk ahead of a long prefill.",
        "bytes",
        WORKER | DAEMON,
        part=_moved("host", "stream"),
    )
    copied_demanded_bytes: int = _counter(
        "Bytes of records copied to the device that kernels waited for.",
        "bytes",
        WORKER,
        part=_moved("device", "demand"),
    )
    copied_prefetched_bytes: int = _counter(
        "Bytes of records copied to the device on a prediction.",
        "bytes",
        WORKER,
        part=_moved("device", "prefetch"),
    )
    copied_streamed_bytes: int = _counter(
        "Bytes of records copied to the device for steps that need more experts than a layer has slots.",
        "bytes",
        WORKER,
        part=_moved("device", "stream"),
    )
    failed_loads: int = _counter("Records that could not be read, or were damaged.", "experts", WORKER | DAEMON)
    imported: int = _counter("Records taken over from the memory of an earlier daemon.", "experts", DAEMON)
    stall_seconds: float = _counter(
        "Time forward passes spent waiting for loads.",
        "seconds",
        WORKER,
        column="stalled",
        phrase="of the time stalled",
    )
    streamed: int = _counter(
        "Experts loaded ahead of a long prefill while it computed the layer before.", "experts", WORKER | DAEMON
    )
    prefetches: int = _counter("Speculative loads started on a prediction.", "experts", WORKER | DAEMON)
    prefetch_useful: int = _counter(
        "Speculative loads that were complete when first needed.",
        "experts",
        WORKER | DAEMON,
        column="useful",
        phrase="useful prefetches",
    )
    prefetch_late: int = _counter(
        "Speculative loads that were still under way when needed.",
        "experts",
        WORKER | DAEMON,
        column="late",
        phrase="late prefetches",
    )
    prefetch_wasted: int = _counter(
        "Speculative loads that were evicted before anyone needed them.",
        "experts",
        WORKER | DAEMON,
        column="wasted",
        phrase="wasted prefetches",
    )
    prefetch_withdrawn: int = _counter(
        "Speculative loads that were taken back before they had begun, when their layer turned out not to need them.",
        "experts",
        WORKER | DAEMON,
    )
    prefetch_expected: float = _counter(
        "Speculative loads expected to be used: the sum of their probabilities. As many as the useful and late ones "
        "together where probabilities are calibrated.",
        "probability",
        WORKER,
    )
    evictions: int = _counter("Experts that lost their slots to others.", "experts", WORKER | DAEMON)
    warmed: int = _counter(
        "Experts brought into slots while a new request's prompt was read, because similar requests had used them.",
        "experts",
        WORKER,
    )
    prediction_failures: int = _counter(
        "Exceptions after which an engine goes on without prediction.", "exceptions", WORKER
    )
    unsound_tokens: int = _counter(
        "Tokens left out of history and trace because a router gave weights or experts that cannot be.",
        "tokens",
        WORKER,
    )
    failed_requests: int = _counter("Requests that failed because an expert could not be had.", "requests", WORKER)
    steps: int = _counter("Forward passes.", "steps", WORKER, column="steps")
    tokens: int = _counter("Tokens scheduled, those of prompts included.", "tokens", WORKER, column="tokens")
    waves: int = _counter(
        "Kernel calls beyond the first of a layer, made because its experts did not fit in the slots together.",
        "calls",
        WORKER,
    )

    layers: int = _gauge("MoE layers of the model.", "layers", WORKER)
    device_managed_layers: int = _gauge("MoE layers whose slots a device manages by itself.", "layers", WORKER)
    experts: int = _gauge("Experts of the model, of all its layers.", "experts", WORKER | DAEMON)
    expert_bytes: int = _gauge("Bytes of all experts together.", "bytes", WORKER | DAEMON)
    slots: int = _gauge("Slots that may be occupied at present.", "slots", WORKER | DAEMON)
    slot_bytes: int = _gauge("Bytes of experts that these slots hold.", "bytes", WORKER | DAEMON)
    resident_experts: int = _gauge("Experts that are in slots.", "experts", WORKER | DAEMON)
    pinned_slots: int = _gauge(
        "Slots that could not be given away at the moment: being read or being loaded.", "slots", WORKER
    )
    resident_bytes: int = _gauge("Bytes of experts that are resident.", "bytes", DAEMON)
    attached_workers: int = _gauge("Engine workers that use the model now.", "workers", DAEMON)
    history_requests: int = _gauge("Requests the model's history holds.", "requests", WORKER | DAEMON)
    history_tokens: int = _gauge("Tokens the model's history holds.", "tokens", WORKER | DAEMON)
    learned_tokens: int = _gauge("Tokens the predictor's heads have learned from.", "tokens", WORKER)
    failed_threads: int = _gauge("Threads of the process that have ended by an exception.", "threads", WORKER)

    def as_dict(self, statistics: Iterable[Statistic]) -> dict[str, Number]:
        """The values of some statistics by name."""
        return {each.name: getattr(self, each.name) for each in statistics}

    def add(self, report: LoadReport) -> None:
        """Count what a pool has done."""
        self.hits += report.hits
        self.misses += report.misses
        self.host_hits += report.host_hits
        self.copied_bytes += report.copied_bytes
        self.copied_demanded_bytes += (
            report.copied_bytes - report.copied_prefetched_bytes - report.copied_streamed_bytes
        )
        self.copied_prefetched_bytes += report.copied_prefetched_bytes
        self.copied_streamed_bytes += report.copied_streamed_bytes
        self.streamed += report.streamed
        self.loads += report.loads
        self.loaded_bytes += report.loaded_bytes
        self.demanded_bytes += report.loaded_bytes - report.prefetched_bytes - report.streamed_bytes
        self.prefetched_bytes += report.prefetched_bytes
        self.streamed_bytes += report.streamed_bytes
        self.failed_loads += report.failed
        self.stall_seconds += report.waited
        self.prefetches += report.started
        self.prefetch_withdrawn += report.withdrawn
        self.prefetch_useful += report.useful
        self.prefetch_late += report.late
        self.prefetch_wasted += report.wasted
        self.evictions += report.evicted

    def merge(self, others: Iterable["Stats"]) -> "Stats":
        """Add the counters of others to these; gauges stay as they are. Returns itself."""
        for other in others:
            for name in _COUNTERS:
                setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def to_words(self) -> list[int]:
        """What a worker counts, one word per statistic of ``WORKER_STATISTICS``."""
        return [each.to_word(value) for each, value in zip(WORKER_STATISTICS, _worker_values(self), strict=True)]

    @classmethod
    def from_words(cls, words: Iterable[int]) -> "Stats":
        """The inverse of ``to_words``."""
        values: dict[str, Any] = {
            each.name: each.from_word(word) for each, word in zip(WORKER_STATISTICS, words, strict=True)
        }
        return cls(**values)


STATISTICS = tuple(Statistic(each.name, **each.metadata) for each in fields(Stats))
WORKER_STATISTICS = tuple(each for each in STATISTICS if WORKER in each.source)
DAEMON_STATISTICS = tuple(each for each in STATISTICS if DAEMON in each.source)
MODEL_STATISTICS = tuple(each for each in STATISTICS if DAEMON in each.source or each.kind == "counter")
"""What the daemon's status says of a model: what the daemon counts, and the sums of what only its workers count."""

_COUNTERS = tuple(each.name for each in STATISTICS if each.kind == "counter")
_worker_values = attrgetter(*(each.name for each in WORKER_STATISTICS))
