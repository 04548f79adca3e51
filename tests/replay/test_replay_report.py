import json
from dataclasses import replace

import numpy as np
import pytest
from replay_traces import random_trace
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.errors import ConfigError, TraceError
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.hardware import hardware_profile, model_profile
from vllm_moe_offload.replay.report import Setup, parse_slots, replay, spread_requests
from vllm_moe_offload.replay.sweep import BELADY, LRU_PER_LAYER, PERFECT, Point, best_at_bytes, sweep
from vllm_moe_offload.trace.trace_file import write_trace

SETUP = Setup(
    slots=192,
    predictor="coactivation",
    hardware=hardware_profile("rtx4090-pcie4"),
    model=model_profile("openai/gpt-oss-20b", None),
)


@pytest.fixture(scope="module")
def report(short, example):
    return replay(short, SETUP, example.select([1, 5, 9]))


def test_the_report_has_what_it_promises(short, report):
    assert report["accesses"] == short.experts.size
    assert report["tokens"] == report["frontier_tokens"] == short.num_tokens
    assert set(report["recall"]) == {"0", "1", "2", "3"}
    for by_count in report["recall"].values():
        assert set(by_count) == {"4", "8"}
        for value in by_count.values():
            assert len(value["layers"]) == 24
            assert value["mean"] == pytest.approx(np.mean(value["layers"][6:]), abs=1e-6)
    assert report["belady_miss_rate"] < report["no_prefetch"]["demand_miss_rate"]
    assert report["perfect_prediction"]["demand_miss_rate"] < report["demand_miss_rate"]
    assert set(report["prefetch"]) == {"useful", "late", "wasted"}
    assert report["tpot_seconds"] > report["stall_seconds_per_token"] > 0
    assert json.loads(json.dumps(report)) == report


def test_the_frontier_trades_bytes_for_stalls(report):
    loads = [point["loads_per_use"] for point in report["frontier"]]
    misses = [point["demand_miss_rate"] for point in report["frontier"]]
    assert loads == sorted(loads) and misses == sorted(misses, reverse=True)
    at_threshold = next(point for point in report["frontier"] if point["threshold"] == report["threshold"])
    assert at_threshold["demand_miss_rate"] == report["demand_miss_rate"]


def test_a_replay_is_deterministic(short, example, report):
    assert replay(short, SETUP, example.select([1, 5, 9])) == report


def test_without_a_predictor_nothing_is_prefetched(short):
    plain = replay(short, Setup(slots=192, predictor="none"))
    assert plain["frontier"] == [] and plain["prefetch"] == {"useful": 0, "late": 0, "wasted": 0}
    assert plain["loads_per_use"] == plain["demand_miss_rate"] == plain["no_prefetch"]["demand_miss_rate"]


def test_a_history_of_another_model_is_refused(short):
    other = replace(short, num_experts=64)
    with pytest.raises(TraceError, match="must be of one model"):
        replay(short, SETUP, other)


def test_slots_are_a_number_or_a_share(short):
    assert parse_slots("25%", short) == parse_slots("192", short) == 192
    for wrong in ("0", "101%", "many", "-3", "769"):
        with pytest.raises(ConfigError, match="slots:"):
            parse_slots(wrong, short)


def test_a_sample_is_spread_over_the_trace(example):
    assert spread_requests(example, 10**6).tolist() == list(range(10))
    assert spread_requests(example, 330).tolist() == [0, 4, 9]


def test_accuracy_counts_what_was_found_and_what_was_said():
    accuracy = Accuracy(layers=8, top_k=2, distances=(1,), counts=(1, 2))
    probabilities = np.array([[0.9, 0.5, 0.1], [0.8, 0.1, 0.7]], np.float32)
    accuracy.note(1, 7, probabilities, np.array([[0, 2], [1, 2]]))
    assert accuracy.recall(1, 1)[7] == 0.25 and accuracy.recall(1, 2)[7] == 0.5
    assert np.isnan(accuracy.recall(1, 1)[0])
    said, used = 0.9 + 0.5 + 0.2 + 0.8 + 0.7, 4
    share, mean_said, mean_used = accuracy.calibration(1)
    assert (share * mean_said).sum() * 6 == pytest.approx(said, abs=1e-5)
    assert (share * mean_used).sum() * 6 == pytest.approx(used)
    # The two predictions of 0.1 share a bin, and both were used; every other has its own.
    assert accuracy.calibration_error(1) == pytest.approx((0.1 + 0.5 + 2 * 0.9 + 0.8 + 0.3) / 6, abs=1e-5)


def test_a_sweep_has_all_cells_and_bounds(short):
    parts = list(sweep(short, None, Setup(slots=192), policies=("lfu",), predictors=("none", "frequency")))
    points = [point for part in parts for point in part]
    cells = {(point.slots, point.policy, point.predictor) for point in points}
    assert len(cells) == 4 * (2 + 3)
    assert {point.predictor for point in parts[-1]} == {PERFECT}
    for slots in {point.slots for point in points}:
        best = min(p.loads_per_use for p in points if p.slots == slots and p.policy == BELADY)
        assert all(p.loads_per_use >= best for p in points if p.slots == slots)


def test_a_sweep_leaves_out_sizes_that_cannot_hold_a_step():
    trace = random_trace(2, 32, 4, lengths=(4, 4, 4))
    alone, together = (
        {point.slots for part in sweep(trace, None, setup, ("lru",), ("none",)) for point in part}
        for setup in (Setup(slots=64), Setup(slots=64, batch=3))
    )
    assert alone == {8, 16, 32, 48} and together == {16, 32, 48}
    with pytest.raises(TraceError, match="no tokens"):
        list(sweep(trace.select([]), None, Setup(slots=64)))


def test_the_best_point_is_the_one_that_can_be_afforded():
    points = [Point(8, "lru", "x", p, miss, loads) for p, miss, loads in ((0.9, 0.3, 0.35), (0.5, 0.2, 0.5))]
    assert best_at_bytes(points, 0.4).threshold == 0.9
    assert best_at_bytes(points, 0.5).threshold == 0.5
    assert best_at_bytes(points, 0.1).threshold == 0.9


def run(*arguments):
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def test_the_command_prints_one_object_or_a_table(short, tmp_path):
    write_trace(tmp_path / "t.npz", short)
    printed = run(tmp_path / "t.npz", "--slots", "50%", "--predictor", "frequency", "--policy", "lru", "--json")
    assert printed.exit_code == 0
    report = json.loads(printed.stdout)
    assert (report["slots"], report["policy"], report["predictor"]) == (384, "lru", "frequency")
    table = run(tmp_path / "t.npz", "--predictor", "none", "--hardware", "rtx4090-pcie4")
    assert table.exit_code == 0 and "belady" in table.stdout and "ms per token" in table.stdout


def test_the_command_says_what_is_wrong_in_one_line(short, tmp_path):
    write_trace(tmp_path / "t.npz", short)
    write_trace(tmp_path / "none.npz", short.select([]))
    write_trace(tmp_path / "loops.npz", replace(short, repetitive=np.ones(3, bool)))
    write_trace(tmp_path / "meant.npz", replace(short, embeddings=short.embeddings[:, :8]))
    for arguments, words in (
        ((tmp_path / "absent.npz",), "no such trace"),
        ((tmp_path / "t.npz", "--predictor", "oracle"), "'oracle' is unknown"),
        ((tmp_path / "t.npz", "--predictor", "none", "--policy", "fifo"), "'fifo' is unknown"),
        ((tmp_path / "t.npz", "--slots", "2"), "give at least 4 slots"),
        ((tmp_path / "t.npz", "--policy", "fifo"), "'fifo' is unknown"),
        ((tmp_path / "t.npz", "--slots", "inf%"), "neither a number like 192"),
        ((tmp_path / "t.npz", "--threshold", "1.5"), "1.5 is not a probability"),
        ((tmp_path / "t.npz", "--threshold", "nan"), "nan is not a probability"),
        ((tmp_path / "t.npz", "--hardware", "abacus"), "rtx4090-pcie4"),
        ((tmp_path / "t.npz", "--plot", "t.bmp"), ".png, .svg"),
        ((tmp_path / "t.npz", "--plot", tmp_path / "absent" / "t.png"), "is not a folder"),
        ((tmp_path / "none.npz",), "no tokens"),
        ((tmp_path / "loops.npz",), "--keep-repetitive"),
        ((tmp_path / "t.npz", "--history", tmp_path / "meant.npz"), "must have made both"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == 2 and words in failed.output and "Traceback" not in failed.output


def test_the_sweep_command_prints_every_predictor_and_the_bounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "t.npz", random_trace(2, 8, 2, lengths=(4, 3)))
    printed = run("t.npz", "--sweep")
    assert printed.exit_code == 0
    for words in ("belady", "lru per layer", "perfect", "no prefetch", "moe-infinity", "least-stale", "drawn"):
        assert words in printed.stdout


def test_what_is_named_narrows_the_sweep(tmp_path):
    write_trace(tmp_path / "t.npz", random_trace(2, 8, 2, lengths=(4, 3)))
    named = ("--policy", "lru", "--predictor", "frequency", "--slots", "50%")
    points = json.loads(run(tmp_path / "t.npz", "--sweep", "--json", *named).stdout)["points"]
    assert {point["slots"] for point in points} == {8}
    assert {point["policy"] for point in points} == {BELADY, LRU_PER_LAYER, "lru"}
    assert {point["predictor"] for point in points} == {"none", "frequency", PERFECT}
    assert points == json.loads(run(tmp_path / "t.npz", "--sweep", "--json", *named).stdout)["points"]
    failed = run(tmp_path / "t.npz", "--sweep", "--slots", "1")
    assert failed.exit_code == 2 and "slots: 1 are too few" in failed.output
