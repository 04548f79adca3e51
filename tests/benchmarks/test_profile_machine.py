"""profile_machine.py: a profile reproduces what it was made from, and replay reads it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from profile_machine import LayerTimes, fit
from remembering import all_but_one

from vllm_moe_offload.plan.loads import fit_loads
from vllm_moe_offload.replay.hardware import ModelProfile, hardware_profile

MODEL = ModelProfile(record_bytes=1 << 20, dense_bytes_per_layer=300_000, expert_parameters=1 << 19)
ONE = LayerTimes(experts=0.9e-3, between=0.4e-3, step=3e-3, distinct=4.0)
MANY = LayerTimes(experts=2.5e-3, between=0.5e-3, step=3e-3, distinct=20.0)


def test_loads_are_a_latency_and_a_time_per_record() -> None:
    assert fit_loads([0.3, 0.5, 0.7, 0.9]) == pytest.approx((0.1, 0.2))
    latency, moving = fit_loads([0.1, 0.5, 0.9])
    assert latency == 0 and 0.2 < moving < 0.4


def test_a_profile_takes_as_long_as_the_machine_did(tmp_path: Path) -> None:
    made = fit(ONE, MANY, [1.0e-3, 1.8e-3, 2.6e-3, 3.4e-3, 4.2e-3], 0.5, MODEL, layers=8, top_k=4)
    (tmp_path / "machine.json").write_text(json.dumps(asdict(made)))
    profile = hardware_profile(str(tmp_path / "machine.json"))
    assert profile == made and profile.model == MODEL
    assert profile.load_seconds(1 << 20) == pytest.approx([1.0e-3, 1.8e-3, 2.6e-3, 3.4e-3, 4.2e-3])
    per_expert = MODEL.record_bytes / profile.memory_bytes_per_second
    assert per_expert == pytest.approx(1e-4)
    dense = MODEL.dense_bytes_per_layer / profile.memory_bytes_per_second
    assert profile.layer_overhead_seconds + dense + 4 * per_expert == pytest.approx(ONE.experts + ONE.between)
    assert profile.step_overhead_seconds == pytest.approx(ONE.step - ONE.between)


def test_layers_of_one_row_are_right_even_where_wide_ones_take_out_of_proportion_long() -> None:
    slow = MANY._replace(experts=40e-3)
    made = fit(ONE, slow, [1e-3, 2e-3], 0.5, MODEL, layers=8, top_k=4)
    read = (MODEL.dense_bytes_per_layer + 4 * MODEL.record_bytes) / made.memory_bytes_per_second
    assert made.layer_overhead_seconds + read == pytest.approx(ONE.experts + ONE.between)


def test_all_but_one_expert(tmp_path: Path, tiny_moe: Path) -> None:
    share = float(all_but_one(tiny_moe).removesuffix("%")) / 100
    assert 511 <= share * 512 < 512
