"""`vllm-moe-offload selftest`: what it concludes from answers and rates, and what it says where it cannot run."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.cli.check import OK, PROBLEM, WARNING, Check
from vllm_moe_offload.cli.gpu_check import Driver
from vllm_moe_offload.cli.selftest import verdict
from vllm_moe_offload.cli.selftest_engines import ChildError, Outcome, arms, child, judge
from vllm_moe_offload.cli.selftest_rates import judge_rates

PLAIN = Outcome([[1, 2, 3], [4, 5, 6]], 10.0, {})
ENGAGED = {"hits": 5, "misses": 3, "loads": 3}
PLAIN_ARM, OURS = arms(gpu=False)
RATES = {
    "registration_seconds_per_gib": 0.1,
    "copies_alone": {"1048576": 18e9, "67108864": 24e9},
    "copies_together": {"1048576": 22e9, "67108864": 25e9},
    "gather": {"4": 9e9, "64": 24e9},
    "hidden": 0.97,
}


def test_every_mode_is_compared_with_plain_vllm_in_the_same_mode() -> None:
    for gpu in (False, True):
        engines = {arm.name: arm for arm in arms(gpu)}
        assert len(engines) == len(arms(gpu)), "names are unique"
        for arm in engines.values():
            assert (arm.offload is None) == (arm.reference == "")
            if arm.offload is not None:
                assert engines[arm.reference].engine == arm.engine and engines[arm.reference].offload is None


def test_equal_tokens_are_well_and_say_how_fast() -> None:
    check = judge(OURS, PLAIN._replace(ms_per_token=15.0, stats=ENGAGED), PLAIN)
    assert check == Check(OURS.name, OK, "the tokens of plain vLLM; 15.00 ms a token, 1.50 x plain")
    assert judge(PLAIN_ARM, PLAIN, None).state == OK


@pytest.mark.parametrize(
    ("outcome", "reference", "words"),
    [
        (PLAIN._replace(tokens=[[1, 2, 3], [4, 9, 6]], stats=ENGAGED), PLAIN, "from token 1 of request 1 on"),
        (PLAIN, PLAIN, "nothing was offloaded"),
        (PLAIN._replace(stats={"hits": 0, "misses": 0}), PLAIN, "nothing was offloaded"),
        (PLAIN._replace(failure="CUDA error"), PLAIN, "did not run: CUDA error"),
        (PLAIN._replace(stats=ENGAGED), PLAIN._replace(failure="no kernel"), "cannot be compared"),
    ],
)
def test_whatever_is_not_proven_is_broken(outcome: Outcome, reference: Outcome, words: str) -> None:
    check = judge(OURS, outcome, reference)
    assert check.state == PROBLEM and words in check.detail


def test_good_rates_are_told_in_numbers() -> None:
    checks = list(judge_rates(RATES))
    assert [check.state for check in checks] == [OK] * 4
    assert "1.0 MiB 18.0 / 22.0" in checks[1].detail and "96%" in checks[2].detail and "97%" in checks[3].detail


def test_slow_loads_and_missing_overlap_are_hints_and_refused_registration_a_warning() -> None:
    slow = {check.subject: check for check in judge_rates(RATES | {"gather": {"64": 15e9}, "hidden": 0.3})}
    assert (
        slow["loads by the GPU itself, GB/s"].state == WARNING and "60%" in slow["loads by the GPU itself, GB/s"].detail
    )
    assert slow["loads beside kernels"].state == WARNING
    (refused,) = judge_rates({"refused": "out of memory"})
    assert refused.state == WARNING and "out of memory" in refused.detail


def test_the_verdict_names_what_is_wrong_first() -> None:
    fine, slow, wrong = Check("a", OK, ""), Check("b", WARNING, ""), Check("c", PROBLEM, "")
    assert verdict([fine]) == "Offloading works here: every engine gave the tokens of plain vLLM."
    assert verdict([fine, slow]).endswith("slower than it could be: b.")
    assert "(c)" in verdict([fine, slow, wrong]) and "does not work" in verdict([fine, slow, wrong])


@pytest.mark.skipif(Driver.load() is not None, reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["selftest", "--gpu"])
    assert result.exit_code == 2 and result.stdout == ""
    assert "needs an NVIDIA GPU" in result.stderr and "libcuda.so.1" in result.stderr


def test_without_a_model_it_says_where_one_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["selftest", "--model", str(tmp_path)])
    assert result.exit_code == 2 and "examples/models/tiny-moe" in result.stderr


def test_a_child_that_fails_hands_over_its_error() -> None:
    with pytest.raises(ChildError, match="KeyError: 'engine'"):
        child({"prompts": []}, {})


def test_the_command_prints_one_object_and_ends_with_1_where_an_engine_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    outcomes = {PLAIN_ARM.name: PLAIN, OURS.name: PLAIN._replace(stats=ENGAGED)}
    monkeypatch.setattr(sys.modules[verdict.__module__], "run", lambda arm, model, stores: outcomes[arm.name])
    result = CliRunner().invoke(app, ["selftest", "--model", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and [check["state"] for check in found["checks"]] == [OK, OK]
    outcomes[OURS.name] = PLAIN._replace(failure="it ended")
    result = CliRunner().invoke(app, ["selftest", "--model", str(tmp_path)])
    assert result.exit_code == 1 and "did not run: it ended" in result.stdout and "please report" in result.stdout
