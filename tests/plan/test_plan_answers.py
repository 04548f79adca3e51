"""From figures to an answer: what fits where, the knee, the verdict, and a whole plan."""

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import build
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.plan.checkpoint import read_folder
from vllm_moe_offload.plan.curve import knee
from vllm_moe_offload.plan.model_config import ModelConfig
from vllm_moe_offload.plan.planning import MEASURE, Plan, Question, make_plan
from vllm_moe_offload.plan.sizes import ModelSizes, MoeLayer, model_sizes
from vllm_moe_offload.plan.tiers import Memory, fewest_slots, slot_bytes, slots_in, tiers
from vllm_moe_offload.plan.verdict import Figures, Verdict, verdict

MIB = 1 << 20
TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("deepseek-v3", tmp_path_factory.mktemp("model")).path


models = st.builds(
    lambda layers, experts, record, top_k: ModelSizes(
        tuple(MoeLayer(f"{n}", experts, record) for n in range(layers)), min(top_k, experts), 0, 0, 0, True, 1
    ),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1000, 1 << 20),
    st.integers(1, 8),
)


@given(models, st.integers(0, 1 << 27), st.booleans())
@settings(max_examples=60, deadline=None)
def test_slots_are_as_many_as_fit(sizes: ModelSizes, room: int, is_gpu: bool) -> None:
    slots = slots_in(sizes, room, is_gpu)
    least = fewest_slots(sizes, is_gpu)
    assert slots == 0 or least <= slots <= sizes.experts
    if slots:
        assert slot_bytes(sizes, slots, is_gpu) <= room
    if slots < sizes.experts:
        assert slot_bytes(sizes, max(slots + 1, least), is_gpu) > room


@given(st.integers(0, 1 << 28), st.integers(0, 1 << 28), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_expert_lies_somewhere(fast: int, host: int, is_gpu: bool) -> None:
    sizes = ModelSizes(tuple(MoeLayer(f"{n}", 16, MIB) for n in range(4)), 4, MIB, MIB, 0, True, 1)
    config = ModelConfig("m", {"hidden_size": 64, "intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4})
    placed = tiers(sizes, config, Memory(fast, host, is_gpu), MIB)
    assert placed.room_bytes == placed.usable_bytes - 2 * MIB - placed.working_bytes
    if placed.slots == 64:
        assert placed.experts_on_disk_bytes == placed.experts_in_host_bytes == 0
    else:
        held = placed.experts_in_host_bytes if is_gpu else placed.slots * MIB
        assert held + placed.experts_on_disk_bytes == 64 * MIB


def test_the_knee_is_where_a_curve_bends() -> None:
    assert knee([1, 2, 3, 4, 5], [100, 50, 20, 18, 16]) == 2
    assert knee([1, 2, 8], [9, 2, 1]) == 1
    assert knee([1, 2, 3], [3, 2, 1]) == 0
    assert knee([4], [1]) == 0


def figures(**changes: object) -> Figures:
    known = Figures(False, 100, 1000, 10, 128, 8, 0.5, 0.02, 0.015)
    return known._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "word", "said"),
    [
        ({}, Verdict.GOOD, "1.3 x"),
        ({"tpot_seconds": 0.03}, Verdict.USABLE, "2.0 x"),
        ({"tpot_seconds": 0.1}, Verdict.SLOW, "6.7 x"),
        ({"tpot_seconds": 0.6, "resident_seconds": 0.5}, Verdict.SLOW, "1.2 x"),
        ({"tpot_seconds": 0.3}, Verdict.DO_NOT, "only 50% of the experts get a slot"),
        ({"tpot_seconds": 0.1, "experts": 8, "top_k": 4}, Verdict.DO_NOT, "few large experts: a token uses 4 of 8"),
        ({"fits_whole": True}, Verdict.DO_NOT, "fits into fast memory anyway: serve it with plain vLLM"),
        ({"slots": 0, "room_bytes": -5}, Verdict.DO_NOT, "leave 0 B for slots.*lower --context or --concurrency"),
    ],
)
def test_the_verdict_says_why(changes: dict[str, object], word: Verdict, said: str) -> None:
    found, reason = verdict(figures(**changes))
    assert found is word and re.search(said, reason)


def test_a_plan_for_a_gpu(model: Path) -> None:
    made = make_plan(
        Question(
            str(model), 900 * MIB, 64 << 30, concurrency=2, context=512, hardware="rtx4090-pcie4", shares=(0.25, 0.5)
        )
    )
    assert (made.tiers.fast_name, made.hardware.name, made.hardware_measured) == ("VRAM", "rtx4090-pcie4", False)
    assert made.points[-1].share == 1 and made.points[-1].hit_rate == 1 and made.points[-1].stall_seconds == 0
    assert all(one.tpot_seconds >= other.tpot_seconds for one, other in itertools.pairwise(made.points))
    assert "no GPU was measured: its figures are from data sheets and estimates" in made.notes
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made


def test_a_plan_with_too_little_host_memory_reads_from_the_disk(model: Path) -> None:
    plenty, little = (
        make_plan(
            Question(str(model), 600 * MIB, host, concurrency=1, context=512, hardware="rtx4090-pcie4", shares=(0.5,))
        )
        for host in (1 << 30, 1 * MIB)
    )
    assert little.tiers.experts_on_disk_bytes > 0 == plenty.tiers.experts_on_disk_bytes
    assert little.hardware.name == "rtx4090-pcie4 behind nvme4"
    assert little.points[0].tpot_seconds > plenty.points[0].tpot_seconds


def test_a_plan_for_this_machine(tmp_path: Path) -> None:
    store, shares = tmp_path / "stores", (0.5,)
    question = Question(str(TINY_MOE), 1460 * MIB, concurrency=1, context=256, store=store, shares=shares)
    heard: list[str] = []
    made = make_plan(question, heard.append)
    assert made.hardware_measured and made.tiers.fast_name == "RAM"
    assert (made.model.experts, made.model.record_bytes, made.model.exact) == (512, 73_728, True)
    assert made.routing.kind == "same model"
    assert any("disk" in what for what in heard)
    assert list(tmp_path.iterdir()) == []
    assert made.chosen is not None and made.points[made.chosen].slots == made.tiers.slots < 512
    assert f"--moe-offload-cache {made.points[made.chosen].nbytes >> 20}MiB" in made.command


def test_more_slots_than_memory_are_shown_as_what_they_would_buy(model: Path) -> None:
    made = make_plan(
        Question(str(model), 1 * MIB, 1 << 30, context=128, concurrency=1, hardware="l4-pcie4", shares=(0.5,))
    )
    assert made.chosen is None and made.verdict == "do not"
    assert not any(point.fits for point in made.points)
    assert "moe-offload" not in made.command


def test_hardware_that_is_not_known(model: Path) -> None:
    with pytest.raises(ConfigError, match="hardware: 'rtx9090' is no profile"):
        make_plan(Question(str(model), hardware="rtx9090"))
    assert MEASURE == "measure"


def test_sizes_of_a_model_with_dense_first_layers(model: Path) -> None:
    assert len(model_sizes(read_folder(model), on_cpu=True).layers) == 3
