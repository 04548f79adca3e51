"""comparison.py: arms, what they are called, and what they are compared with."""

from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from comparison import Arm, checkout, references_of, variants_of

from vllm_moe_offload.bench.comparison import Workload

ARMS = [Arm.parse('none={"predictor": "none"}'), Arm.parse('history={"predictor": "history"}')]


def test_every_arm_runs_at_every_budget_next_to_its_reference() -> None:
    variants = variants_of(ARMS, ["25%", "50%"], {"model": "m"}, None)
    assert [variant.name for variant in variants] == ["25% none", "25% history", "50% none", "50% history"]
    assert variants[1].offload == {"cache": "25%", "predictor": "history"}
    references = references_of(ARMS, ["25%", "50%"], "none")
    assert references["50% history"] == references["50% none"] == "50% none"
    assert set(references_of([Arm("", {})], ["25%"], "plain").items()) == {("25%", "plain"), ("plain", "plain")}


@pytest.mark.parametrize("text", ["history", "={}", 'history="25%"', "history={"])
def test_what_is_no_arm_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Arm.parse(text)


def test_a_reference_that_is_no_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no such arm; there are none, history"):
        references_of(ARMS, ["25%"], "lru")


def test_rounds_go_through_the_prompts() -> None:
    workload = Workload(["a", "b", "c"], [2], 4, 3)
    assert [[texts[0] for texts in workload.prompts(2, number)] for number in range(3)] == [
        ["a", "b"],
        ["c", "a"],
        ["b", "c"],
    ]
    assert workload.prompts(1, 1) == [["b", "c", "a"]]


def test_an_arm_runs_with_the_plugin_of_another_checkout(tmp_path: Path) -> None:
    (tmp_path / "vllm_moe_offload").mkdir()
    old = Arm("none", {"predictor": "none"}).of(*checkout(f"old={tmp_path}"))
    (variant,) = variants_of([old], ["25%"], {}, None)
    assert (variant.name, variant.checkout) == ("25% none old", tmp_path)
    assert Arm("", {}).of("old", tmp_path).at("25%") == "25% old"


@pytest.mark.parametrize("text", ["old", "=.", "old=/nowhere"])
def test_what_is_no_checkout_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="NAME=FOLDER"):
        checkout(text)
