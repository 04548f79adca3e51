"""decode.py on a tiny input: both engines run for real, and what it writes is what they did."""

import json
import os
import subprocess
import sys
from pathlib import Path

DECODE = Path(__file__).parents[2] / "benchmarks" / "decode.py"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Per engine: importing vLLM takes longer than what these engines do."""


def _decode(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, dict]:
    out = tmp_path / "out.json"
    command = [sys.executable, str(DECODE), "--eager", "--max-model-len", "256", "--tokens", "4", "--json", str(out)]
    environment = {**os.environ, **environment}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text())


def test_plain_and_ours_take_turns_and_agree_and_who_fails_is_named(tmp_path: Path) -> None:
    code, result = _decode(tmp_path, "--budgets", "25%,1KiB", "--batch", "2", "--rounds", "2", "--prompt-tokens", "40")
    (comparison,) = result["comparisons"]
    assert code == 1 and list(comparison["failures"]) == ["1KiB"], comparison["failures"]
    summary = comparison["batches"]["2"]["summary"]
    assert set(summary) == {"plain", "25%"}
    ours = summary["25%"]
    assert ours["same_tokens"] is True
    assert ours["rounds"] == 2
    assert 0 < ours["slot_bytes"] <= ours["expert_bytes"] / 4
    assert ours["loaded_bytes"]["low"] > 0
    assert all(set(results) == {"plain", "25%"} for results in comparison["batches"]["2"]["rounds"])
    runs = [run for results in comparison["batches"]["2"]["rounds"] for run in results.values()]
    assert all(run["prompt_tokens"] == 80 and all(len(tokens) == 4 for tokens in run["tokens"]) for run in runs)


def test_arms_start_with_copies_of_a_warm_history_and_leave_it_as_it_was(tmp_path: Path, tiny_moe: Path) -> None:
    warm = tmp_path / "warm"
    command = [sys.executable, str(DECODE.with_name("warm.py")), str(warm), "--stored-tokens", "600", "--tokens", "24"]
    done = subprocess.run(command, env={**os.environ, **ONE_PROCESS}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in warm.rglob("*") if path.is_file())
    assert files == ["engine.trace", "heads.npz", "held_out.jsonl", "history.lock", "history.npz"]
    before = {path: path.read_bytes() for path in warm.rglob("*") if path.is_file()}

    arms = ["--arm", 'off={"predictor": "none"}', "--arm", 'on={"predictor": "history"}', "--reference", "off"]
    options = ["--budgets", "25%", "--batch", "1", "--rounds", "1", "--no-plain", "--tokens", "24", *arms]
    code, result = _decode(tmp_path, *options, "--warm", str(warm), **ONE_PROCESS)
    (comparison,) = result["comparisons"]
    assert code == 0, comparison["failures"]
    summary = comparison["batches"]["1"]["summary"]
    assert list(summary) == ["25% off", "25% on"]
    assert summary["25% on"]["same_tokens"] is True
    assert summary["25% off"]["tpot_ratio"] == {"median": 1, "low": 1, "high": 1}
    assert sum(summary["25% off"]["prefetch"].values()) == 0
    assert comparison["batches"]["1"]["rounds"][0]["25% on"]["totals"]["prefetches"] > 0
    assert before == {path: path.read_bytes() for path in warm.rglob("*") if path.is_file()}
