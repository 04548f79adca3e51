"""`vllm-moe-offload bench`, with engines of real processes that answer what a script says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from tests.daemon.wire import wait_until
from vllm_moe_offload.bench.arms import PLAIN, arms, fit_together, left_out
from vllm_moe_offload.bench.summary import Spread
from vllm_moe_offload.bench.verdict import in_words, verdicts
from vllm_moe_offload.cli import app

SCRIPTED = "tests.bench.scripted_runner"
GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    commands = sys.modules["vllm_moe_offload.cli.bench"]
    monkeypatch.setattr(commands, "RUNNER", SCRIPTED)
    monkeypatch.setattr(commands.Driver, "load", lambda: None)
    monkeypatch.setattr(commands, "memory_limits", lambda: {"machine": 100 * GIB})
    return str(tmp_path)


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, ["bench", *arguments])


def test_engines_are_compared_and_what_is_slower_is_said(model: str, tmp_path: Path) -> None:
    picture = tmp_path / "result.png"
    result = run(model, "--budgets", "25%", "--batch", "1,2", "--rounds", "2", "--tokens", "4", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert f"batch 2: 25%, no prediction: SLOWER, 3.00 x the time per token (3.00-3.00), than {PLAIN}" in result.stdout
    assert "batch 1: prediction at 25%: faster, 0.67 x the time per token (0.67-0.67), than without it" in result.stdout
    assert "75.0%" in result.stdout and "1.0 MiB of 4.0 MiB" in result.stdout
    assert picture.stat().st_size > 1000
    assert [child for child in psutil.Process().children() if SCRIPTED in child.cmdline()] == [], "engines have ended"


def test_everything_measured_is_in_the_object(model: str) -> None:
    result = run(model, "--budgets", "25%", "--rounds", "2", "--tokens", "4", "--json")
    found = json.loads(result.stdout)
    assert found["reference"] == PLAIN and found["absent"] == {} and found["machine"]["cores"] >= 1
    ours = found["summaries"]["1"]["25%, prediction"]
    assert ours["tpot_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0} and ours["same_tokens"] is True
    assert [sorted(turn) for turn in found["turns"]["1"]] == [sorted(found["loaded"])] * 2
    assert [each["runs"] for turn in found["turns"]["1"] for each in turn.values()] == [2] * 3 + [3] * 3


def test_an_engine_that_fails_is_named_and_ends_with_1(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", "plain,history")
    result = run(model, "--budgets", "25%", "--rounds", "1", "--tokens", "4")
    assert result.exit_code == 1
    assert f"{PLAIN}: {PLAIN}: exit code 1: ValueError: plain is not to start" in result.stderr
    assert "25%, no prediction" in result.stdout, "those that ran are shown"


def test_sigterm_ends_the_engines_too(model: str) -> None:
    module = "sys.modules['vllm_moe_offload.cli.bench']"
    code = f"import sys; from vllm_moe_offload.cli import app; {module}.RUNNER = {SCRIPTED!r}; "
    code += f"{module}.Driver.load = lambda: None; {module}.memory_limits = lambda: {{'machine': {100 * GIB}}}; "
    code += f"app(['bench', {model!r}, '--rounds', '1000000'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        engines: list[psutil.Process] = []
        while len(engines) < 5:
            assert process.poll() is None
            engines = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(60) != 0
    wait_until(lambda: not any(map(lives, engines)), "all engines have ended")


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_one_engine_at_a_time_where_memory_does_not_hold_all(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm_moe_offload.cli.bench"], "memory_limits", lambda: {"machine": 3 * GIB})
    result = run(model, "--budgets", "25%", "--rounds", "2", "--tokens", "4", "--json")
    turns = json.loads(result.stdout)["turns"]["1"]
    assert [each["runs"] for turn in turns for each in turn.values()] == [2] * 6, "a warm-up and one turn each"


def test_what_does_not_fit_is_left_out_and_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = sys.modules["vllm_moe_offload.cli.bench"]
    monkeypatch.setattr(commands, "memory_limits", lambda: {"machine": 12 * GIB})
    monkeypatch.setattr(commands, "weight_bytes", lambda folder: 20 * GIB)
    result = run(model, "--budgets", "25%", "--rounds", "1", "--tokens", "4")
    assert result.exit_code == 0
    assert f"{PLAIN}: does not fit: needs about 22.0 GiB, 12.0 GiB are free" in result.stderr
    assert "than 25%, no prediction" in result.stdout, "the reference then"
    monkeypatch.setattr(commands, "weight_bytes", lambda folder: 2000 * GIB)
    refused = run(model)
    assert refused.exit_code == 2 and refused.stderr.startswith("error: --budgets 25%,50%: no engine fits")


def test_vllms_own_offloading_is_an_arm_on_a_gpu_with_as_much_memory() -> None:
    plain, own, ours, predicting = arms({"25%": 0.25}, True, 100 * GIB)
    assert own.arguments["cpu_offload_gb"] == pytest.approx(0.75 * 85) and not own.offloads
    assert ours.arguments["additional_config"]["moe_offload"]["predictor"] == "none"
    assert predicting.without_prediction == ours.name
    assert left_out([plain, own, ours], 100 * GIB, 50 * GIB).keys() == {plain.name}
    assert not fit_together([plain, ours], 100 * GIB, 100 * GIB) and fit_together([plain], 10 * GIB, 20 * GIB)
    assert len(arms({"25%": 0.25}, False, None)) == 3


def test_other_tokens_and_noise_are_said() -> None:
    every = arms({"25%": 0.25}, False, None)
    turn = {
        arm.name: {
            "tpot": [0.01],
            "ttft": 1.0,
            "prompt_tokens": 1,
            "peak_bytes": 1,
            "tokens": [[number]],
            "counters": {},
        }
        for number, arm in enumerate(every)
    }
    sentences = list(verdicts(1, [turn], every, PLAIN))
    assert sentences[0].endswith(f"than {PLAIN}; ITS TOKENS DIFFER")
    assert in_words(Spread(1.2, 0.9, 1.3)).startswith("neither faster nor slower beyond the noise, 1.20 x")
    assert in_words(Spread(1.2, 1.1, 1.3)).startswith("SLOWER") and in_words(Spread(0.8, 0.7, 0.9)).startswith("faster")
