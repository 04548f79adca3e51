"""This machine without a GPU, measured in seconds: its disk as an engine reads records from it, memory, arithmetic.

What an engine's layers cost besides was measured once, inside vLLM 0.32 with tiny-moe and with experts 16 times as
wide, and is scaled by how fast this machine does small operations.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, StoreError
from ..replay.hardware import HardwareProfile
from ..store.identity import StoreIdentity
from ..store.layout import Component, RecordLayout, align
from ..store.reader import Store
from ..store.root import StoreRoot
from ..store.writer import StoreWriter
from .loads import AT_ONCE, demand_seconds, finding_seconds, fit_loads

NAME = "this machine"


class HostCosts(NamedTuple):
    """What steps cost besides loads, reading weights and arithmetic: in small operations that take as long."""

    layer: float
    step: float
    lookup: float
    miss: float


COMPILED = HostCosts(layer=420, step=1600, lookup=800, miss=480)
EAGER = HostCosts(layer=1090, step=1800, lookup=340, miss=480)
_KERNEL_SHARE = 0.25
"""Of the rate at which memory is read from end to end, what vLLM's expert kernel reaches for one token's experts."""

_STORE_BYTES = 192 << 20
_FEWEST, _MOST = 24, 96
"""Records that are written to be read."""
_PAUSE_SECONDS = 1e-3
_ROUNDS = 12
_MATRIX, _SQUARE = 6144, 1024
_OPERATIONS = 1000
_REPEATS = 16


def measured_machine(
    record_bytes: int,
    top_k: int,
    folder: Path,
    enforce_eager: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> HardwareProfile:
    """A profile of this machine for records of ``record_bytes``.

    Args:
        folder: of the stores; records are written beside it, read, and removed.
        enforce_eager: whether layers are to be those of an engine without torch.compile.
        progress: hears what is measured next.

    Raises:
        ConfigError: nothing can be written there.
    """
    progress("memory and arithmetic")
    rates = _rates()
    place = _existing(folder)
    progress(f"the disk of {place}")
    try:
        with tempfile.TemporaryDirectory(prefix=".vllm-moe-offload-plan-", dir=place) as scratch:
            store = _store(Path(scratch), record_bytes)
            try:
                latency, moving = fit_loads(demand_seconds(store, _PAUSE_SECONDS, _ROUNDS))
                finding = finding_seconds(store, min(top_k, _FEWEST // 4))
            finally:
                store.close()
    except (OSError, StoreError) as error:
        raise ConfigError(
            f"--hardware measure: the disk of {place} cannot be measured ({error}); free some space or name another "
            "folder with --store, or name a machine instead"
        ) from error
    costs = EAGER if enforce_eager else COMPILED
    return HardwareProfile(
        name=NAME,
        bytes_per_second=align(record_bytes) / moving,
        load_latency_seconds=latency,
        memory_bytes_per_second=_KERNEL_SHARE * rates.memory_bytes_per_second,
        flops_per_second=rates.flops_per_second,
        layer_overhead_seconds=costs.layer * rates.operation_seconds,
        loads_at_once=AT_ONCE,
        step_overhead_seconds=costs.step * rates.operation_seconds,
        demand_overhead_seconds=finding,
        lookup_seconds=costs.lookup * rates.operation_seconds,
        miss_overhead_seconds=costs.miss * rates.operation_seconds,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _store(folder: Path, record_bytes: int) -> Store:
    """A store of one layer, of as many records as are worth reading. Raises StoreError."""
    count = max(_FEWEST, min(_MOST, _STORE_BYTES // record_bytes))
    layout = RecordLayout((Component("record", "uint8", (record_bytes,), record_bytes),))
    writer = StoreRoot(folder).open_or_build(StoreIdentity({"measured": record_bytes}))
    assert isinstance(writer, StoreWriter)
    content = np.random.default_rng(0).integers(0, 256, record_bytes, np.uint8)
    writer.add_layer("layer", layout, [np.broadcast_to(content, (count, record_bytes))])
    return writer.finish()


class _Rates(NamedTuple):
    """What this machine reaches when nothing else runs on it."""

    operation_seconds: float
    """One operation on few numbers, as a layer makes hundreds of."""
    memory_bytes_per_second: float
    """Reading a matrix larger than the caches of a core from end to end."""
    flops_per_second: float


def _rates() -> _Rates:
    """The best of several rounds, because other processes only ever slow a round down."""
    numbers, vector = np.ones(256, np.float32), np.ones(_MATRIX, np.float32)
    matrix, square = np.ones((_MATRIX, _MATRIX), np.float32), np.ones((_SQUARE, _SQUARE), np.float32)
    work: tuple[Callable[[], object], ...] = (
        lambda: [np.add(numbers, 1, out=numbers) for _ in range(_OPERATIONS)],
        lambda: matrix @ vector,
        lambda: square @ square,
    )
    operations, reading, product = (
        min(times) for times in zip(*([_seconds(w) for w in work] for _ in range(_REPEATS)), strict=True)
    )
    return _Rates(operations / _OPERATIONS, matrix.nbytes / reading, 2 * _SQUARE**3 / product)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
