"""Who is in which slot of a window: hypothesis draws windows, routings, padding and ids that are not there."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_moe_offload.windows.tables import ABSENT, HALF_LIFE, MOST_HEAT, USE, TooManyExpertsError, WindowTables

Ids = NDArray[np.int32]


class Step(NamedTuple):
    ids: Ids
    real_rows: int
    number: int


class Run(NamedTuple):
    experts: int
    slots: int
    owned: NDArray[np.bool_]
    steps: list[Step]

    def tables(self) -> WindowTables:
        return WindowTables(self.experts, self.slots, self.owned)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Steps whose used experts fit; some ids are -1, some rows padding, some experts kept elsewhere."""
    experts = draw(st.integers(2, 160))
    slots = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    owned = rng.random(experts) < draw(st.sampled_from([0.5, 1.0, 1.0]))
    steps = []
    number = 0
    for _ in range(draw(st.integers(1, 40))):
        number += int(rng.choice([0, 1, 1, 1, 5, HALF_LIFE, 40 * HALF_LIFE]))
        rows, top_k = int(rng.integers(1, 20)), int(rng.integers(1, 9))
        some = rng.choice(experts, int(rng.integers(1, slots + 1)), replace=False)
        ids = rng.choice(some, (rows, top_k)).astype(np.int32)
        ids[rng.random(ids.shape) < 0.05] = -1
        real = int(rng.integers(0, rows + 1))
        ids[real:] = rng.integers(0, experts, ids[real:].shape)
        steps.append(Step(ids, real, number))
    return Run(experts, slots, owned, steps)


def used_by(step: Step, owned: NDArray[np.bool_]) -> set[int]:
    return {int(expert) for expert in step.ids[: step.real_rows].ravel() if expert >= 0 and owned[expert]}


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_used_expert_has_the_slot_its_rows_are_given(run: Run) -> None:
    tables = run.tables()
    for step in run.steps:
        before = set(tables.expert_of.tolist())
        served = tables.serve(step.ids, step.number, step.real_rows)
        tables.check_integrity()
        used = used_by(step, run.owned)
        assert used <= set(tables.expert_of.tolist())
        assert served.misses[:, 0].tolist() == sorted(used - before)
        assert (tables.expert_of[served.misses[:, 1]] == served.misses[:, 0]).all()
        for row in range(step.real_rows):
            for expert, slot in zip(step.ids[row], served.slots[row], strict=True):
                assert slot == ABSENT if expert < 0 or not run.owned[expert] else tables.expert_of[slot] == expert
        expected = served.slots[0] if step.real_rows else 0
        assert (served.slots[step.real_rows :] == expected).all()


@settings(max_examples=60, deadline=None)
@given(runs())
def test_free_slots_go_first_then_the_least_used_by_heat_and_number(run: Run) -> None:
    tables = run.tables()
    for step in run.steps:
        used = used_by(step, run.owned)
        epoch = step.number // HALF_LIFE
        worth = [
            (0 if expert == ABSENT else 1 + (int(tables.heat[expert]) >> min(epoch - int(tables.epoch[expert]), 31)), s)
            for s, expert in enumerate(tables.expert_of.tolist())
            if expert not in used
        ]
        misses = tables.serve(step.ids, step.number, step.real_rows).misses
        assert misses[:, 1].tolist() == [slot for _, slot in sorted(worth)[: len(misses)]]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_a_use_counts_once_a_step_and_half_after_each_epoch(run: Run) -> None:
    tables = run.tables()
    heat, epoch_of = [0] * run.experts, [0] * run.experts
    for step in run.steps:
        tables.serve(step.ids, step.number, step.real_rows)
        epoch = step.number // HALF_LIFE
        for expert in used_by(step, run.owned):
            heat[expert] = min(heat[expert] // 2 ** (epoch - epoch_of[expert]) + USE, MOST_HEAT)
            epoch_of[expert] = epoch
    assert tables.heat.tolist() == heat and tables.epoch.tolist() == epoch_of


@settings(max_examples=30, deadline=None)
@given(runs(), st.integers(0, 1 << 30))
def test_decisions_do_not_depend_on_the_order_of_choices(run: Run, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables, other = run.tables(), run.tables()
    for step in run.steps:
        order = rng.permutation(step.ids.shape[1])
        served, shuffled = tables.serve(*step_arguments(step)), other.serve(*step_arguments(step, order))
        assert (served.misses == shuffled.misses).all()
        assert (served.slots[:, order] == shuffled.slots).all()
    assert (tables.expert_of == other.expert_of).all() and (tables.heat == other.heat).all()


def step_arguments(step: Step, order: NDArray[np.int64] | slice = slice(None)) -> tuple[Ids, int, int]:
    return step.ids[:, order], step.number, step.real_rows


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    tables = WindowTables(8, 3)
    tables.serve(np.array([[0, 1]]), 0)
    before = tables.slot_of.copy(), tables.expert_of.copy(), tables.heat.copy()
    with pytest.raises(TooManyExpertsError):
        tables.serve(np.array([[0, 2], [3, 4]]), 1)
    for array, kept in zip((tables.slot_of, tables.expert_of, tables.heat), before, strict=True):
        assert (array == kept).all()


def test_heat_does_not_overflow_where_steps_do_not_advance() -> None:
    tables = WindowTables(4, 2)
    tables.heat[1] = MOST_HEAT
    tables.serve(np.array([[1]]), 0)
    assert tables.heat[1] == MOST_HEAT


def test_an_overwritten_window_is_filled_again_and_remembers_its_heat() -> None:
    tables = WindowTables(6, 3)
    tables.serve(np.array([[5, 2]]), 0)
    heat = tables.heat.copy()
    tables.forget()
    tables.check_integrity()
    assert (tables.heat == heat).all()
    assert tables.serve(np.array([[5, 2]]), 1).misses.tolist() == [[2, 0], [5, 1]]


@settings(max_examples=40, deadline=None)
@given(runs(), st.integers(0, 1 << 30))
def test_a_speculative_load_brings_in_the_likeliest_absent_expert_and_drops_no_likely_one(run: Run, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = run.tables()
    for step in run.steps:
        tables.serve(*step_arguments(step))
        scores = rng.normal(size=run.experts).astype(np.float32)
        before, heat = set(tables.expert_of.tolist()) - {ABSENT}, tables.heat.copy()
        speculative = tables.speculate(scores, step.number, 1.0)
        tables.check_integrity()
        after = set(tables.expert_of.tolist()) - {ABSENT}
        absent = [expert for expert in range(run.experts) if run.owned[expert] and expert not in before]
        likely = [expert for expert in absent if scores[expert] > 1.0]
        kept = [expert for expert in before if scores[expert] > 1.0]
        assert len(speculative) == (bool(likely) and len(kept) < run.slots)
        assert set(kept) <= after and (tables.heat == heat).all()
        if len(speculative):
            assert speculative[0, 0] == max(likely, key=scores.__getitem__) and after - before == {speculative[0, 0]}
            assert len(before - after) == (len(before) == run.slots)
        else:
            assert after == before
