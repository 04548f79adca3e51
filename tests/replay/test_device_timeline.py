"""What a GPU is forecast to make of a trace: arithmetic against the design's tables, and the replay itself."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_traces import random_trace
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.replay.bounds import perfect_forecast
from vllm_moe_offload.replay.device_timeline import DeviceTimeline, padded
from vllm_moe_offload.replay.forecast import Forecast
from vllm_moe_offload.replay.hardware import PROFILE_NAMES, ModelProfile, hardware_profile, model_profile
from vllm_moe_offload.replay.report import Setup, replay
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.replay.side_stream import SideStream
from vllm_moe_offload.replay.step_time import StepTime, most_gain
from vllm_moe_offload.replay.windows import Windows, equal_windows
from vllm_moe_offload.trace.trace import PREFILL
from vllm_moe_offload.trace.trace_file import write_trace
from vllm_moe_offload.windows.speculation import DISTANCE

MODEL = model_profile("openai/gpt-oss-20b", None)
RTX4090, H100, GH200 = (hardware_profile(name) for name in ("rtx4090-pcie4", "h100-pcie5", "gh200-c2c"))
ON_DEVICE = RTX4090.manager.device_seconds
ON_HOST = RTX4090.manager.host_seconds

# Layers, experts, top-k; then for each GPU: microseconds of a layer, of one expert through the link, and their ratio.
MODELS = {
    "openai/gpt-oss-20b": (24, 32, 4, ((152, 529, 3.5), (55, 264, 4.8), (48, 38, 0.8))),
    "openai/gpt-oss-120b": (36, 128, 4, ((152, 529, 3.5), (55, 264, 4.8), (48, 38, 0.8))),
    "Qwen/Qwen3-30B-A3B": (48, 128, 8, ((161, 378, 2.4), (57, 189, 3.3), (50, 27, 0.5))),
    "Qwen/Qwen3-30B-A3B-FP8": (48, 128, 8, ((90, 189, 2.1), (36, 94, 2.6), (33, 13, 0.4))),
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": (48, 128, 8, ((56, 97, 1.7), (26, 49, 1.9), (24, 7, 0.3))),
    "deepseek-ai/DeepSeek-V2-Lite": (26, 64, 6, ((226, 692, 3.1), (77, 346, 4.5), (67, 49, 0.7))),
    "mistralai/Mixtral-8x7B-v0.1": (32, 8, 2, ((998, 14096, 14.1), (309, 7048, 22.8), (261, 1007, 3.9))),
    "zai-org/GLM-4.5-Air-FP8": (45, 128, 8, ((348, 692, 2.0), (114, 346, 3.0), (98, 49, 0.5))),
    "deepseek-ai/DeepSeek-V3": (58, 256, 8, ((743, 1762, 2.4), (233, 881, 3.8), (197, 126, 0.6))),
}


def time_of(hardware, name="openai/gpt-oss-20b"):
    return StepTime(hardware, model_profile(name, None), *MODELS[name][:3])


def run(trace, forecast=None, hardware=RTX4090, slots=192, batch=1, manager=ON_DEVICE):
    return DeviceTimeline(trace, slots, hardware, MODEL, manager, forecast).run(steps(trace, batch))


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_records_take_what_the_design_calculated(name):
    for hardware, (layer, record, ahead) in zip((RTX4090, H100, GH200), MODELS[name][3], strict=True):
        time = time_of(hardware, name)
        assert time.layer(time.top_k, 1) * 1e6 == pytest.approx(layer, rel=0.02, abs=0.6)
        assert time.record * 1e6 == pytest.approx(record, rel=0.01, abs=0.6)
        assert time.record / time.layer(time.top_k, 1) == pytest.approx(ahead, rel=0.04, abs=0.06)


@pytest.mark.parametrize(
    ("hardware", "shares", "resident", "tokens", "gain"),
    [
        (RTX4090, (0.318, 0.287), 3.6, (19.8, 18.2), 1.25),
        (RTX4090, (0.102, 0.088), 3.6, (8.8, 8.1), 1.81),
        (H100, (0.318, 0.287), 1.3, (9.4, 8.6), 1.18),
        (H100, (0.102, 0.088), 1.3, (3.9, 3.5), 1.59),
        (GH200, (0.318, 0.287), 1.2, (2.3, 2.2), 1.90),
    ],
)
def test_a_token_and_the_most_that_prediction_gains_are_what_the_design_calculated(
    hardware, shares, resident, tokens, gain
):
    time = time_of(hardware)
    computing, moving = 24 * time.layer(4, 1), 24 * 4 * time.record
    assert computing * 1e3 == pytest.approx(resident, abs=0.05)
    for share, token in zip(shares, tokens, strict=True):
        assert (computing + share * moving) * 1e3 == pytest.approx(token, rel=0.03)
    assert most_gain(computing, shares[1] * moving) == pytest.approx(gain, rel=0.03)


@pytest.mark.parametrize(
    ("name", "pcie4", "pcie5"),
    [
        ("openai/gpt-oss-20b", 0.41, 0.20),
        ("Qwen/Qwen3-30B-A3B-FP8", 1.16, 0.58),
        ("zai-org/GLM-4.5-Air-FP8", 3.99, 1.99),
        ("deepseek-ai/DeepSeek-V3", 26, 13),
    ],
)
def test_a_prefill_step_takes_what_the_link_takes_for_all_experts(name, pcie4, pcie5):
    for hardware, expected in ((RTX4090, pcie4), (H100, pcie5)):
        time = time_of(hardware, name)
        all_experts = time.layers * time.experts * time.record
        assert all_experts == pytest.approx(expected, rel=0.03)
        assert all_experts < time.prefill(512) < 1.05 * all_experts


def test_every_load_of_a_decoded_token_is_waited_for_and_nothing_else(short):
    report = run(short)
    time, tally = time_of(RTX4090), report.tally
    assert report.link_seconds >= tally.demand_loads * time.record
    waits = (report.stall_seconds - tally.demand_loads * time.record) / RTX4090.load_latency_seconds
    assert round(waits, 6) == round(waits) and 0 < waits <= tally.demand_loads, "one latency per layer that loads"
    layers = short.num_tokens * 24 * (time.layer(4, 1) + ON_DEVICE)
    assert report.total_seconds == pytest.approx(layers + report.stall_seconds)
    assert tally.accesses == short.experts.size and report.tokens == short.num_tokens


def test_a_host_that_decides_costs_its_time_at_every_layer(short):
    slower, faster = run(short, manager=ON_HOST), run(short)
    assert slower.tpot_seconds - faster.tpot_seconds == pytest.approx(24 * (ON_HOST - ON_DEVICE))
    assert slower.tally == faster.tally


def test_with_every_expert_in_its_memory_a_step_takes_what_its_layers_take(short):
    report = run(short, perfect_forecast(short, (4,)), slots=768)
    assert report.tpot_seconds == pytest.approx(24 * time_of(RTX4090).layer(4, 1))
    assert report.stall_seconds == 0 and report.tally.demand_loads == report.tally.prefetch_loads == 0


@pytest.mark.parametrize(("hardware", "distance"), [(RTX4090, 4), (H100, 5), (GH200, 1), (RTX4090, 3)])
def test_true_speculative_loads_save_time(short, hardware, distance):
    longer = short.select([*range(short.num_requests)] * 4)
    without, informed = run(longer, hardware=hardware), run(longer, perfect_forecast(longer, (distance,)), hardware)
    assert informed.total_seconds < without.total_seconds
    tally = informed.tally
    assert 0 < tally.prefetch_loads <= longer.num_tokens * (24 - distance), "one record a layer at most"
    assert tally.useful + tally.late + tally.wasted == tally.prefetch_loads
    assert without.total_seconds / informed.total_seconds <= most_gain(
        without.total_seconds - without.stall_seconds, without.stall_seconds
    )


def test_layers_wait_for_speculative_loads_that_take_longer_than_they_do(short):
    near = run(short, perfect_forecast(short, (1,)))
    assert near.tally.late > 0 and time_of(RTX4090).record > time_of(RTX4090).layer(4, 1)


def test_doubtful_speculative_loads_are_not_made(short):
    doubtful = Forecast((4,), np.full((short.num_tokens, 1, 24, 32), 0.4, np.float16))
    assert run(short, doubtful).tally.prefetch_loads == 0


def test_a_step_too_wide_for_windows_loads_what_it_uses_and_leaves_them_alone(short):
    wide = run(short, batch=3, slots=24 * 12)
    assert padded(3) * 4 > 12
    assert wide.tally.demand_loads == wide.tally.accesses > 0, "nothing is kept from step to step"
    narrow = run(short, batch=3, slots=24 * 16)
    assert narrow.tally.demand_loads < narrow.tally.accesses == wide.tally.accesses


def test_a_prompt_between_two_tokens_costs_only_the_windows_it_is_lent(short):
    rows = np.arange(16)
    decoded = [np.array([row]) for row in rows]
    prompt = np.repeat(np.arange(16, 48), 20)
    decode_only = DeviceTimeline(short, 192, RTX4090, MODEL, ON_DEVICE).run(decoded)
    between = DeviceTimeline(short, 192, RTX4090, MODEL, ON_DEVICE).run([*decoded[:8], prompt, *decoded[8:]])
    used = sum(len(np.unique(short.experts[16:48, layer])) for layer in range(24))
    again = between.tally.demand_loads - used - decode_only.tally.demand_loads
    assert 0 < again <= 2 * 32
    time = time_of(RTX4090)
    prompt_seconds = between.total_seconds - decode_only.total_seconds - again * time.record
    assert prompt_seconds == pytest.approx(time.prefill(len(prompt)), rel=0.02)


def test_prompts_are_not_counted_as_decoding(short):
    phase = np.zeros(short.num_tokens, np.uint8)
    phase[:8] = PREFILL
    report = run(replace(short, phase=phase))
    assert report.decoding.tokens == report.decoding.steps == short.num_tokens - 8
    assert report.tokens == short.num_tokens


@pytest.mark.parametrize(("rows", "graph"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24), (512, 512)])
def test_rows_are_padded_to_the_next_captured_size(rows, graph):
    assert padded(rows) == graph


def test_loads_move_in_parts_beside_layers():
    side = SideStream()
    side.start(3.0, parts=3)
    side.fork()
    side.pass_time(0.4)
    assert side.join() == pytest.approx(0.6), "what is left of the first part"
    side.start(2.0, parts=2)
    side.fork()
    side.pass_time(5.0)
    assert side.join() == 0, "nothing moves that is not due"
    side.fork()
    assert side.join() == pytest.approx(2.0), "the last part of either"
    side.fork()
    assert side.join() == 0 and side.busy_seconds == pytest.approx(5.0)


def test_windows_are_equal_and_hold_a_token():
    assert equal_windows(194, 24, 32, 4) == [9, 9] + [8] * 22
    assert equal_windows(10_000, 24, 32, 4) == [32] * 24
    with pytest.raises(ConfigError, match="give at least 96"):
        equal_windows(95, 24, 32, 4)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_speculative_load_ends_as_right_or_wasted_once(data):
    experts, layers = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 4))
    slots = data.draw(st.lists(st.integers(2, experts), min_size=layers, max_size=layers))
    windows = Windows(slots, experts, record_bytes=4096)
    speculated = right = wasted = 0
    for _ in range(data.draw(st.integers(1, 12))):
        windows.begin_step()
        for layer in range(layers):
            absent = np.flatnonzero(windows.absent(layer))
            if len(absent) and data.draw(st.booleans()):
                wasted += windows.speculate(layer, data.draw(st.sampled_from(absent.tolist())))
                speculated += 1
            ids = np.array(data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=2, unique=True)))
            absent_before = windows.absent(layer)
            missing, was_right, was_wasted = windows.use(layer, ids)
            assert missing == absent_before[ids].sum() and not windows.absent(layer)[ids].any()
            right, wasted = right + was_right, wasted + was_wasted
        if data.draw(st.booleans()):
            wasted += windows.lend()
    assert speculated == right + wasted + windows.finish()


@pytest.fixture(scope="module")
def report(short, example):
    setup = Setup(slots=192, predictor="coactivation", hardware=RTX4090, model=MODEL)
    return replay(short, setup, example.select([1, 5, 9]))


def test_the_report_has_both_modes_the_bound_and_prefill(report, short):
    assert json.loads(json.dumps(report)) == report
    assert report["resident_tpot_seconds"] < report["no_prefetch_tpot_seconds"] < report["host_managed_tpot_seconds"]
    assert report["speculative_distance"] == DISTANCE and report["planned"]["useful"] > 0
    assert report["tpot_seconds"] < report["resident_tpot_seconds"] + report["stall_seconds_per_token"] + 1e-3
    assert 1 < report["most_prediction_gain"] <= 2
    assert report["prefill_seconds"] > report["prefill_link_seconds"] > 0.4
    assert report["narrow_slots"] == 24 * 4
    plain = replay(short, Setup(slots=192, predictor="none", hardware=RTX4090, model=MODEL))
    assert plain["speculative_distance"] is None
    assert plain["tpot_seconds"] == plain["no_prefetch_tpot_seconds"] == report["no_prefetch_tpot_seconds"]


def test_the_command_says_how_many_slots_a_batch_needs(tmp_path):
    trace = random_trace(3, 16, 2, lengths=(4,) * 8)
    write_trace(tmp_path / "t.npz", trace)
    given = [
        "replay",
        str(tmp_path / "t.npz"),
        "--predictor",
        "frequency",
        "--record-bytes",
        "100000",
        "--slots",
        "50%",
    ]
    for batch, words in ((1, "host-managed"), (4, "from 24 slots on"), (8, "from 48 slots on")):
        printed = CliRunner().invoke(app, [*given, "--hardware", "h100-pcie5", "--batch", str(batch)])
        assert printed.exit_code == 0, printed.output
        assert (words in printed.stdout) == (batch != 4) and "nothing was measured" in printed.stdout
    failed = CliRunner().invoke(app, [*given[:-1], "5", "--hardware", "h100-pcie5"])
    assert failed.exit_code == 2 and "give at least 6" in failed.output


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_a_profile_survives_a_file(name, tmp_path):
    profile = hardware_profile(name)
    assert ("nvme" in name) == (profile.manager is None)
    (tmp_path / "mine.json").write_text(json.dumps(asdict(replace(profile, name="mine", model=ModelProfile(1, 2, 3)))))
    assert hardware_profile(str(tmp_path / "mine.json")) == replace(profile, name="mine", model=ModelProfile(1, 2, 3))
