"""Windows, views and stages over many random layouts: what a kernel is shown is always its own memory."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_moe_offload.windows.plan import ALIGNMENT, WindowPlan, is_shared

LAYOUTS = 100_000
EXPERTS = (1, 2, 5, 8, 16, 32, 60, 64, 128, 160, 256, 512)
SIZES = (0, 4, 512, 4096, 5760, 7168, 11520, 259_200, 518_400, 65_552, 65_600, 1_000_001, 2_097_152, 8_294_400)

Numbers = NDArray[np.int64]


class Plans:
    """Random plans, one array per field; ``of`` says which plan a member belongs to."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.choice(SIZES, (count, 3)).tolist()
        layers = rng.choice([1, 2, 3, 4, 6, 9, 24], count).tolist()
        most = rng.choice(EXPERTS, count).tolist()
        mixed = (rng.random(count) < 0.3).tolist()
        shares = rng.random(sum(layers)).tolist()
        self.plans = []
        at = 0
        for number in range(count):
            part = shares[at : at + layers[number]]
            at += layers[number]
            of_layer = [most[number]] * len(part)
            if mixed[number]:
                of_layer = [1 + int(share * 7919) % most[number] for share in part]
            slots = [1 + int(share * one) for share, one in zip(part, of_layer, strict=True)]
            self.plans.append(WindowPlan.of(of_layer, slots, sizes[number]))
        self.sizes = np.array(sizes)
        self.rows = np.array([plan.rows for plan in self.plans])
        self.stage_rows = np.array([plan.stage_rows for plan in self.plans])
        self.of = np.repeat(np.arange(count), layers)
        self.experts, self.slots, self.starts, self.begins = (
            self._flat(name) for name in ("experts", "slots", "starts", "begins")
        )
        self.first_stages = np.array([plan.stages[0] for plan in self.plans])
        self.second_stages = np.array([plan.stages[1] if len(plan.stages) > 1 else -1 for plan in self.plans])
        self.lent = np.array([member in plan.lent for plan in self.plans for member in range(len(plan.slots))])

    def _flat(self, name: str) -> Numbers:
        return np.fromiter(itertools.chain.from_iterable(getattr(plan, name) for plan in self.plans), np.int64)


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans(LAYOUTS, seed=12)


def test_ids_are_below_the_number_of_experts(plans: Plans) -> None:
    bases = plans.starts - plans.begins
    assert (bases >= 0).all()
    assert (bases + plans.slots <= plans.experts).all()
    first = plans.plans[0]
    assert [first.base(member) for member in range(len(first.slots))] == bases[: len(first.slots)].tolist()


def test_views_and_stages_lie_in_the_memory(plans: Plans) -> None:
    assert (plans.begins >= 0).all()
    assert (plans.begins + plans.experts <= plans.rows[plans.of]).all()
    assert (plans.first_stages >= 0).all()
    assert (plans.first_stages + plans.stage_rows <= plans.rows).all()
    assert (plans.stage_rows[plans.of] >= plans.experts).all()


def test_neither_windows_nor_stages_overlap(plans: Plans) -> None:
    same_plan = plans.of[1:] == plans.of[:-1]
    assert ((plans.starts + plans.slots)[:-1] <= plans.starts[1:])[same_plan].all()
    two = plans.second_stages >= 0
    assert 0.2 < two.mean() < 0.9
    assert (plans.second_stages + plans.stage_rows <= plans.first_stages)[two].all()


def test_a_second_stage_is_left_out_only_where_rows_are_too_few(plans: Plans) -> None:
    short = plans.second_stages < 0
    assert (plans.first_stages < plans.stage_rows)[short].all()


def test_views_and_stages_start_aligned_in_every_shared_component(plans: Plans) -> None:
    shared = np.vectorize(is_shared)(plans.sizes)
    assert 0.3 < shared.mean() < 0.9
    for column in range(plans.sizes.shape[1]):
        size = np.where(shared[:, column], plans.sizes[:, column], 0)
        for rows, of in ((plans.begins, plans.of), (plans.first_stages, np.arange(LAYOUTS))):
            assert (rows * size[of] % ALIGNMENT == 0).all()
        assert (np.maximum(plans.second_stages, 0) * size % ALIGNMENT == 0).all()


def test_lent_are_exactly_the_windows_with_a_row_in_a_stage(plans: Plans) -> None:
    def overlaps(stages: Numbers) -> NDArray[np.bool_]:
        stage = stages[plans.of]
        rows = np.minimum(plans.starts + plans.slots, stage + plans.stage_rows[plans.of])
        return (stage >= 0) & (rows > np.maximum(plans.starts, stage))

    assert (plans.lent == (overlaps(plans.first_stages) | overlaps(plans.second_stages))).all()
    assert 0.2 < plans.lent.mean() < 0.9


def test_few_rows_belong_to_nobody(plans: Plans) -> None:
    """Only alignment of large components, or a stage that windows do not fill, costs rows."""
    unit = np.lcm.reduce(np.where(np.vectorize(is_shared)(plans.sizes), 256 // np.gcd(256, plans.sizes), 1), axis=1)
    ends = np.maximum.reduceat(plans.starts + plans.slots, np.flatnonzero(np.r_[True, np.diff(plans.of) > 0]))
    slots = np.bincount(plans.of, plans.slots)
    assert (plans.rows <= np.maximum(ends, plans.stage_rows) + unit - 1).all()
    assert (ends - slots <= (unit - 1) * np.bincount(plans.of)).all()
    assert ((unit > 1).mean() > 0.1) and (plans.rows == np.maximum(slots, plans.stage_rows))[unit == 1].all()


@pytest.mark.parametrize(("experts", "slots"), [((4,), (5,)), ((4, 4), (4, 0)), ((4,), (1, 1)), ((), ())])
def test_windows_of_no_slots_or_of_more_than_experts_have_no_plan(
    experts: tuple[int, ...], slots: tuple[int, ...]
) -> None:
    with pytest.raises(AssertionError):
        WindowPlan.of(experts, slots, (4096,))


def test_the_bytes_of_a_plan_are_shared_rows_and_rows_of_every_layer_and_stage() -> None:
    plan = WindowPlan.of((32, 32, 8), (16, 32, 8), (1 << 20, 100))
    assert plan.stages == (24,)
    assert plan.nbytes((1 << 20, 100)) == (56 << 20) + 3 * 3328 + 1024
