"""Whatever ends a forward pass, wherever: the next one computes with the right bytes, and nothing stays held."""

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_moe_offload
from tests.runtime.record_stores import ODD, RecordStore, build_store
from tests.runtime.test_runtime_serves import Checked, Guesser
from vllm_moe_offload.pool import loader
from vllm_moe_offload.runtime import Batch, runtime

EXPERTS, LAYERS = 8, 3
PACKAGE = str(Path(vllm_moe_offload.__file__).parent)
LOADER = loader.__file__
"""Left out: it takes locks, which a tracer's exception can leave locked where a signal's cannot."""
FEW, HALF = 4, 12
"""Slots: the first makes waves of most steps, the second lets long ones stream."""


@pytest.fixture(autouse=True, scope="module")
def rows_split() -> Iterator[None]:
    """Records of these tests load in no time: rows are computed while others load all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "SPLIT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("store"), [(ODD, EXPERTS)] * LAYERS)


def steps() -> list[list[np.ndarray]]:
    """Small ones, ones that need waves or streaming, and small ones again."""
    random = np.random.default_rng(0)
    return [
        [np.argsort(random.random((rows, EXPERTS)), axis=1)[:, :2].astype(np.int32) for _ in range(LAYERS)]
        for rows in (1, 2, 40, 1)
    ]


def run(checked: Checked) -> None:
    """All steps, with guesses between the layers, as an engine runs them: nothing is looked at meanwhile."""
    for chosen in steps():
        checked.runtime.begin_step(Batch(1))
        for layer in checked.runtime.layers.values():
            with closing(checked.runtime.serve(layer, chosen[layer.index])) as waves:
                for _ in waves:
                    pass
        checked.runtime.take_failures()


def check_as_if_nothing_had_happened(checked: Checked) -> None:
    for chosen in steps():
        checked.step(chosen)
    checked.check_contents()
    assert all(len(pool.cache.pins) == pool.capacity for pool in checked.runtime.pools)


def lines_of(act: Callable[[], None]) -> int:
    """How many lines of the package ``act`` executes in this thread."""
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1

    with at_every_line(counted):
        act()
    return count


@contextmanager
def at_every_line(act: Callable[[], None]) -> Iterator[None]:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == LOADER:
            return None
        if event == "line" and not is_with(frame):
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def is_with(frame: FrameType) -> bool:
    """CPython passes a ``with`` again when it is left; no signal's exception can come between that and ``__exit__``."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


class Raise:
    """Raises once, at the n-th call."""

    def __init__(self, error: type[BaseException], n: int):
        self._error, self._left = error, n

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error("at a line of a test's choice")


def checked_runtime(made: RecordStore, slots: int, seed: int) -> Checked:
    checked = Checked(made, {ODD: slots}, "lfu")
    checked.runtime.prefetcher = Guesser(checked.runtime, seed)  # type: ignore[assignment]
    return checked


@pytest.fixture(scope="module")
def lines(made: RecordStore) -> dict[int, int]:
    """By slots, about how many lines a run executes; how many exactly depends on when reads end."""
    counts = {}
    for slots in (FEW, HALF):
        checked = checked_runtime(made, slots, seed=0)
        counts[slots] = lines_of(partial(run, checked))
        checked.runtime.close()
    return counts


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1, exclude_min=True),
    slots=st.sampled_from([FEW, HALF]),
    error=st.sampled_from([KeyboardInterrupt, MemoryError]),
    seed=st.integers(0, 3),
)
def test_an_exception_at_any_line(
    made: RecordStore, lines: dict[int, int], share: float, slots: int, error: type[BaseException], seed: int
) -> None:
    checked = checked_runtime(made, slots, seed)
    with suppress(error), at_every_line(Raise(error, 1 + int(share * lines[slots]))):
        run(checked)
    checked.runtime.prefetcher = None
    check_as_if_nothing_had_happened(checked)
    checked.runtime.close()


@settings(max_examples=50, deadline=None)
@given(left_at=st.integers(1, 60), slots=st.sampled_from([FEW, HALF]))
def test_a_kernel_that_raises(made: RecordStore, left_at: int, slots: int) -> None:
    """What was held for it is let go of at once, and what is resident stays."""
    checked = Checked(made, {ODD: slots}, "lfu")
    compute = Raise(RuntimeError, left_at)
    try:
        for chosen in steps():
            checked.runtime.begin_step(Batch(1))
            for layer in checked.runtime.layers.values():
                with closing(checked.runtime.serve(layer, chosen[layer.index])) as waves:
                    for _ in waves:
                        compute()
    except RuntimeError:
        checked.check_residency()
        (pool,) = checked.runtime.pools
        under_way = {started.slot for started in pool.in_flight.loads}
        assert set(np.flatnonzero(pool.cache.pins).tolist()) <= under_way
        assert pool.cache.occupied
    check_as_if_nothing_had_happened(checked)
    checked.runtime.close()


def test_a_forward_pass_that_is_never_closed(made: RecordStore) -> None:
    """An exception keeps its frames alive, and with them the waves: the next step must not wait for that."""
    checked = Checked(made, {ODD: FEW}, "lfu")
    (first, *_) = checked.runtime.layers.values()
    kept = checked.runtime.serve(first, np.array([[0, 1], [2, 3]], dtype=np.int32))
    checked.runtime.begin_step(Batch(1))
    next(kept)
    check_as_if_nothing_had_happened(checked)
    kept.close()
    check_as_if_nothing_had_happened(checked)
    checked.runtime.close()
