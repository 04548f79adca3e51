import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from vllm_moe_offload.cache import create_policy
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.replay.bounds import perfect_forecast
from vllm_moe_offload.replay.forecast import Forecast
from vllm_moe_offload.replay.hardware import hardware_profile, model_profile
from vllm_moe_offload.replay.link import Link
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.replay.timeline import Timeline
from vllm_moe_offload.trace.trace import PREFILL

MODEL = model_profile("openai/gpt-oss-20b", None)
GPU = hardware_profile("rtx4090-pcie4")


def run(trace, forecast=None, hardware=GPU, slots=192, batch=1):
    policy = create_policy("lfu", np.repeat(np.arange(24), 32))
    return Timeline(trace, slots, policy, forecast, hardware, MODEL).run(steps(trace, batch))


def test_a_demand_waits_for_the_rest_of_a_chunk_and_no_longer():
    link = Link([1.0], chunk_seconds=0.25)
    link.prefetch([7, 8])
    link.pass_time(0.35)
    assert link.demand(2, []) == pytest.approx(2 + 0.15)
    assert link.queue_seconds == pytest.approx(0.5 + 1)


def test_a_demand_joins_what_is_under_way():
    link = Link([1.0], 0.25)
    link.prefetch([7, 8])
    link.pass_time(0.6)
    assert link.still_loading([7, 8, 9]) == [7, 8]
    assert link.demand(0, [7]) == pytest.approx(0.4)
    assert link.still_loading([7, 8]) == [8]
    link.pass_time(5)
    assert link.queue_seconds == 0 and link.busy_seconds == pytest.approx(2)


def test_only_what_has_not_begun_is_cancelled():
    link = Link([1.0], 0.25)
    link.prefetch([1, 2])
    link.pass_time(0.1)
    link.cancel([1, 2])
    assert link.still_loading([1, 2]) == [1]


def test_loads_side_by_side_share_the_link():
    link = Link([1.0, 1.5, 2.0], 0.25)
    link.prefetch([7, 8, 9])
    link.pass_time(1.5)
    assert link.still_loading([7, 8, 9]) == [9], "two places for speculative loads: 7 and 8 went together"
    assert link.demand(1, []) == pytest.approx(1.5)
    assert link.queue_seconds == 0, "9 went beside the demand, in the place kept for it"


def test_a_demand_never_waits_for_a_place_that_speculative_loads_have():
    link = Link([1.0, 1.0, 1.0], 0.25)
    link.prefetch([1, 2, 3, 4])
    link.pass_time(0.5)
    assert link.demand(1, []) == pytest.approx(1.0)
    assert link.still_loading([1, 2, 3, 4]) == [3, 4] and link.busy_seconds == pytest.approx(1.5)
    assert link.demand(0, [4]) == pytest.approx(1.0)


def test_many_demands_take_all_places():
    link = Link([1.0, 1.2, 1.4], 1.0)
    assert link.demand(3, []) == pytest.approx(1.4)
    assert link.demand(4, []) == pytest.approx(1.4 + 1.0)


def test_what_was_cancelled_never_arrives():
    link = Link([1.0, 1.0], 1.0)
    link.prefetch([1, 2, 3])
    link.pass_time(0.5)
    assert link.cancel([1, 3]) == [3]
    link.pass_time(10)
    assert link.busy_seconds == pytest.approx(2)


def test_without_prefetching_every_load_is_waited_for(short):
    report = run(short)
    load = GPU.load_latency_seconds + MODEL.record_bytes / GPU.bytes_per_second
    assert report.stall_seconds == pytest.approx(report.tally.demand_loads * load)
    assert report.tpot_seconds > report.stall_seconds_per_token > 0
    assert report.tokens == report.steps == short.num_tokens


def test_with_all_experts_resident_nothing_is_loaded(short):
    report = run(short, slots=768)
    assert report.tally.demand_loads == report.stall_seconds == 0 < report.tpot_seconds
    assert run(short, slots=767).tally.demand_loads > 0


def test_a_layer_costs_more_where_the_host_looks_for_slots_and_where_it_waits(short):
    plain = run(short)
    slower = replace(GPU, lookup_seconds=1e-3, miss_overhead_seconds=0.1)
    stalls = len({(row, layer) for row in range(short.num_tokens) for layer in range(24)})
    dearer = run(short, hardware=slower)
    waiting = round((dearer.total_seconds - plain.total_seconds - 1e-3 * stalls) / 0.1)
    assert 0 < waiting <= min(stalls, plain.tally.demand_loads)
    assert dearer.stall_seconds == pytest.approx(plain.stall_seconds)
    resident = run(short, slots=768, hardware=slower)
    assert resident.total_seconds == pytest.approx(run(short, slots=768).total_seconds)


def test_steps_that_warm_the_cache_up_do_not_count(short):
    policy = create_policy("lfu", np.repeat(np.arange(24), 32))
    cold = run(short)
    warm = Timeline(short, 192, policy, None, GPU, MODEL, warm_up=20).run(steps(short, 1))
    assert (warm.steps, warm.tally) == (cold.steps - 20, cold.tally)
    assert warm.total_seconds < cold.total_seconds and warm.stall_seconds < cold.stall_seconds


@pytest.mark.parametrize("hardware", ["rtx3090-pcie3", "gh200-c2c", "rtx5090-nvme5"])
def test_perfect_predictions_never_cost_time(short, hardware):
    profile = hardware_profile(hardware)
    without, informed = run(short, hardware=profile), run(short, perfect_forecast(short, (1, 2)), profile)
    assert informed.total_seconds <= without.total_seconds * 1.001


def test_where_the_link_is_fast_prediction_removes_most_stalls(short):
    fast = replace(GPU, bytes_per_second=400e9, load_latency_seconds=1e-6)
    longer = short.select([*range(short.num_requests)] * 8)
    without, informed = run(longer, hardware=fast), run(longer, perfect_forecast(longer, (1, 2)), fast)
    assert informed.stall_seconds < 0.35 * without.stall_seconds


def test_wrong_predictions_are_turned_down(short):
    """Confident nonsense: the planner finds out and the loss stays small."""
    rng = np.random.default_rng(0)
    nonsense = Forecast((1, 2), (rng.random((short.num_tokens, 2, 24, 32)) > 0.7).astype(np.float16))
    without, misled = run(short), run(short, nonsense)
    assert misled.tally.prefetch_loads < 0.2 * short.num_tokens * 24 * 9
    assert misled.total_seconds < 1.35 * without.total_seconds


def test_what_a_step_costs_besides_its_layers_is_part_of_its_time(short):
    slower = run(short, hardware=replace(GPU, step_overhead_seconds=0.25))
    assert slower.tpot_seconds == pytest.approx(run(short).tpot_seconds + 0.25)
    slow_predictor = run(short, perfect_forecast(short, (1, 2)), replace(GPU, predictor_seconds=1.0))
    assert 24 < slow_predictor.total_seconds < 5 * 24, "a trial, and then no more"


def test_time_per_token_is_that_of_decoding(short):
    phase = np.zeros(short.num_tokens, np.uint8)
    for start, stop in zip(short.offsets, short.offsets[1:], strict=False):
        phase[start : (start + stop) // 2] = PREFILL
    report = run(replace(short, phase=phase), hardware=replace(GPU, step_overhead_seconds=1.0))
    decoded = int((phase == 0).sum())
    assert report.decoding.steps == report.decoding.tokens == decoded
    assert report.steps == decoded + short.num_requests and report.tokens == short.num_tokens
    assert report.tpot_seconds == pytest.approx(1.0, rel=0.05)


def test_a_measured_machine_brings_the_model_it_was_measured_with(short):
    mine = replace(GPU, model=replace(MODEL, dense_bytes_per_layer=0))
    assert run(short, hardware=mine).tpot_seconds < run(short).tpot_seconds
    other = replace(GPU, model=replace(MODEL, dense_bytes_per_layer=0, record_bytes=1000))
    assert run(short, hardware=other).tpot_seconds == run(short).tpot_seconds


def test_a_batch_reads_shared_experts_once(short):
    one, three = run(short), run(short, batch=3)
    assert three.tally.accesses < one.tally.accesses and three.steps == short.num_tokens // 3


def test_hardware_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rtx4090-pcie4"):
        hardware_profile("abacus")
    (tmp_path / "mine.json").write_text('{"name": "mine"}')
    with pytest.raises(ConfigError, match="is not a profile"):
        hardware_profile(str(tmp_path / "mine.json"))
    measured = replace(GPU, name="mine", loads_at_once=5, model=MODEL)
    (tmp_path / "mine.json").write_text(json.dumps(asdict(measured)))
    assert hardware_profile(str(tmp_path / "mine.json")) == measured
    with pytest.raises(ConfigError, match="record-bytes"):
        model_profile("someone/else", None)
    assert model_profile("someone/else", 1000).record_bytes == 1000
