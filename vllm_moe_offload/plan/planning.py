"""One plan from start to end, as plain data ready to print: what ``vllm-moe-offload plan`` answers."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import ConfigError
from ..pool.memory_limits import equal_share, memory_limits
from ..replay.hardware import HardwareProfile, behind_a_disk, hardware_profile
from ..sizes import size_text
from ..trace.trace import Trace
from .curve import knee, timings
from .hub import read_model
from .kv_cache import has_state, kv_cache_bytes
from .machine import measured_machine
from .model_config import ModelConfig
from .sizes import ModelSizes, model_sizes
from .statistics import MOST_REQUESTS, RoutingSource, routing_for, routing_of_trace, single_stream
from .tiers import Memory, Tiers, fewest_slots, slot_bytes, tiers, without_offloading
from .verdict import Figures, verdict

MEASURE = "measure"
_BUSY = 1.0
"""Load average: other processes take time that an engine would have."""
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True)
class Question:
    """What a plan is wanted for."""

    model: str
    memory_bytes: int | None = None
    """Fast memory; None: what the named GPU has, or what is free here."""
    host_memory_bytes: int | None = None
    """Behind a GPU; None: what is free here."""
    concurrency: int = 8
    context: int = 8192
    hardware: str = MEASURE
    trace: Path | None = None
    store: Path = Path()
    """Folder of the stores, whose disk is measured."""
    shares: tuple[float, ...] = SHARES
    """Of all experts, for which there are points."""
    enforce_eager: bool = False
    """As in vLLM: without torch.compile and CUDA graphs."""


class Point(msgspec.Struct, frozen=True):
    """So many slots, and what they buy. Seconds are of one step of decoding, and so of one token of each request."""

    slots: int
    share: float
    nbytes: int
    fits: bool
    hit_rate: float
    stall_seconds: float
    tpot_seconds: float
    """One request at a time; the two before as well."""
    busy_tpot_seconds: float | None
    """``concurrency`` requests at a time; None where a step would be cut up."""


class Model(msgspec.Struct, frozen=True):
    """What the model is, in bytes."""

    name: str
    architecture: str
    exact: bool
    """From the headers of its files; else computed from its config.json."""
    moe_layers: int
    experts_per_layer: int
    experts: int
    top_k: int
    record_bytes: int
    expert_bytes: int
    dense_bytes: int
    draft_bytes: int
    kv_cache_bytes_per_sequence: int


class Plan(msgspec.Struct, frozen=True):
    """The answer to a ``Question``."""

    model: Model
    context: int
    concurrency: int
    hardware: HardwareProfile
    """What the times are of: replay takes it as a JSON file."""
    hardware_measured: bool
    tiers: Tiers
    routing: RoutingSource
    points: list[Point]
    knee: int
    """Index of the point after which more slots buy least."""
    chosen: int | None
    """Index of the point that fits best; None where none does."""
    verdict: str
    reason: str
    command: str
    notes: list[str]


def make_plan(question: Question, progress: Callable[[str], None] = lambda what: None) -> Plan:
    """Read, measure, replay.

    Args:
        progress: hears what is done next.

    Raises:
        ConfigError: the model, a file or the hardware is not what it should be.
        UnsupportedError: the model has no experts.
        TraceError: the trace cannot be used for it.
    """
    on_gpu = question.hardware != MEASURE and _is_gpu(hardware_profile(question.hardware))
    progress(f"reading what {question.model} is")
    checkpoint = read_model(question.model)
    config = ModelConfig(checkpoint.name, checkpoint.config)
    sizes = model_sizes(checkpoint, on_cpu=not on_gpu)
    if question.trace is None:
        trace, source = routing_for(sizes.shape, str(config.values.get("model_type")), question.concurrency)
    else:
        trace, source = routing_of_trace(question.trace, sizes.shape, question.concurrency)
    hardware = _hardware(question, sizes, progress)
    sequence = kv_cache_bytes(config, question.context)
    placed = tiers(sizes, config, _memory(question, hardware, on_gpu), question.concurrency * sequence)
    if placed.experts_on_disk_bytes and hardware.manager is not None:
        hardware = behind_a_disk(hardware)
    progress("replaying routing with each number of slots")
    points = _points(question, sizes, placed, hardware, trace, sequence, on_gpu)
    chosen = max((n for n, point in enumerate(points) if point.fits), default=None)
    word, reason = verdict(_figures(sizes, placed, points, chosen, on_gpu))
    bent = knee([point.nbytes for point in points], [point.tpot_seconds for point in points])
    return Plan(
        _model(checkpoint.name, config, sizes, sequence),
        question.context,
        question.concurrency,
        hardware,
        question.hardware == MEASURE,
        placed,
        source,
        points,
        bent,
        chosen,
        word,
        reason,
        _command(question, placed, points, chosen, on_gpu),
        _notes(question, config, sizes, placed, trace, on_gpu),
    )


def _is_gpu(hardware: HardwareProfile) -> bool:
    return hardware.manager is not None or hardware.memory_bytes > 0


def _hardware(question: Question, sizes: ModelSizes, progress: Callable[[str], None]) -> HardwareProfile:
    if question.hardware != MEASURE:
        return hardware_profile(question.hardware)
    return measured_machine(sizes.record_bytes, sizes.top_k, question.store, question.enforce_eager, progress)


def _memory(question: Question, hardware: HardwareProfile, on_gpu: bool) -> Memory:
    fast, host = question.memory_bytes, question.host_memory_bytes
    here = equal_share([memory_limits()], 0)
    if fast is None:
        fast = hardware.memory_bytes if on_gpu else here
    if not fast:
        raise ConfigError(f"--memory: how much the GPU of {hardware.name} has is not known; give it, like 24GiB")
    if hardware.manager is None:
        return Memory(fast, 0, on_gpu)
    return Memory(fast, here if host is None else host, on_gpu)


def _points(
    question: Question,
    sizes: ModelSizes,
    placed: Tiers,
    hardware: HardwareProfile,
    trace: Trace,
    sequence: int,
    on_gpu: bool,
) -> list[Point]:
    """A point for each share, and for what fits."""
    layers, most, _ = sizes.shape
    least = fewest_slots(sizes, on_gpu)
    wanted = {max(least, round(sizes.experts * share)) for share in question.shares} | {sizes.experts}
    if placed.slots:
        wanted.add(placed.slots)
    slots = sorted(wanted)
    # A replay knows layers of equally many experts only.
    replayed = [round(count * layers * most / sizes.experts) for count in slots]
    batch = min(question.concurrency, MOST_REQUESTS)
    # On average half of the context has been written when a token reads it.
    single = timings(single_stream(trace), replayed, 1, hardware, sizes.profile(sequence // 2))
    busy = single if batch == 1 else timings(trace, replayed, batch, hardware, sizes.profile(batch * sequence // 2))
    return [
        Point(
            count,
            count / sizes.experts,
            slot_bytes(sizes, count, on_gpu),
            count <= placed.slots,
            *one,
            None if many is None else many.tpot_seconds,
        )
        for count, one, many in zip(slots, single, busy, strict=True)
        if one is not None
    ]


def _figures(sizes: ModelSizes, placed: Tiers, points: list[Point], chosen: int | None, on_gpu: bool) -> Figures:
    best, everything = points[0 if chosen is None else chosen], points[-1]
    return Figures(
        fits_whole=without_offloading(sizes, placed),
        slots=placed.slots,
        room_bytes=placed.room_bytes,
        least_bytes=slot_bytes(sizes, fewest_slots(sizes, on_gpu), on_gpu),
        experts=sizes.shape[1],
        top_k=sizes.top_k,
        share=best.share,
        tpot_seconds=best.tpot_seconds,
        resident_seconds=everything.tpot_seconds,
    )


def _model(name: str, config: ModelConfig, sizes: ModelSizes, sequence: int) -> Model:
    layers, experts, top_k = sizes.shape
    return Model(
        name,
        config.architecture,
        sizes.exact,
        layers,
        experts,
        sizes.experts,
        top_k,
        sizes.record_bytes,
        sizes.expert_bytes,
        sizes.dense_bytes,
        sizes.draft_bytes,
        sequence,
    )


def _command(question: Question, placed: Tiers, points: list[Point], chosen: int | None, on_gpu: bool) -> str:
    """What to start, whatever the verdict; without the plugin where everything fits."""
    alone = question.model.endswith(".json")
    words = [
        "vllm",
        "serve",
        str(Path(question.model).parent) if alone else question.model,
        "--max-model-len",
        str(question.context),
    ]
    words += ["--max-num-seqs", str(question.concurrency)]
    words += ["--enforce-eager"] * question.enforce_eager
    if not on_gpu:
        words += ["--kv-cache-memory-bytes", str(max(placed.kv_cache_bytes, 1 << 28))]
    if chosen is not None and points[chosen].share < 1:
        words += ["--plugin", "moe-offload", "--moe-offload-cache", f"{points[chosen].nbytes >> 20}MiB"]
        if placed.host_bytes and placed.experts_on_disk_bytes:
            words += ["--moe-offload-host-cache", f"{placed.experts_in_host_bytes >> 20}MiB"]
    return shlex.join(words)


def _notes(
    question: Question, config: ModelConfig, sizes: ModelSizes, placed: Tiers, trace: Trace, on_gpu: bool
) -> list[str]:
    """What the figures leave out or assume."""
    notes = []
    if not sizes.exact:
        notes.append("sizes are computed from config.json; the headers of the files were not at hand")
    if sizes.draft_bytes:
        notes.append(
            f"{size_text(sizes.draft_bytes)} of layers for drafting (MTP) are not counted: they load on request"
        )
    if has_state(config):
        notes.append("some layers keep a state instead of a KV cache; it is not counted")
    if question.hardware == MEASURE and os.getloadavg()[0] > _BUSY:
        notes.append(
            f"the machine was busy while it was measured (load average {os.getloadavg()[0]:.1f}): measure it again "
            "when it is idle, these times are too long"
        )
    if on_gpu:
        notes.append("no GPU was measured: its figures are from data sheets and estimates")
    if question.enforce_eager and question.hardware != MEASURE:
        notes.append("--enforce-eager makes steps longer than these figures, which are of engines with torch.compile")
    if on_gpu and placed.experts_on_disk_bytes and placed.host_bytes:
        notes.append("times are as if every load came from the disk; those that host memory holds are faster")
    if question.concurrency > MOST_REQUESTS:
        notes.append(f"times of {question.concurrency} requests at once are those of {MOST_REQUESTS}")
    if trace.num_requests < question.concurrency <= MOST_REQUESTS:
        notes.append(f"the trace has only {trace.num_requests} requests to run at once")
    notes.append("nothing is predicted in these figures; prediction is tried while serving, and kept where it pays")
    return notes
