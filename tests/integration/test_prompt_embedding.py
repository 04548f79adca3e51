"""A user's own embedding function: errors at the start name the setting; errors later cost a vector, not a request."""

import logging
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.outside_module import importable
from vllm_moe_offload.errors import ConfigError

MODULE = """
width = 3

def lengths(prompt):
    assert isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if 13 in prompt:
        raise RuntimeError("unlucky")
    return [float(len(prompt))] + [0.0] * (1 if 14 in prompt else 2)

def ones(prompt):
    return [1.0] * width

class Nested:
    @staticmethod
    def half(prompt):
        return [0.5]

def table(prompt):
    return [[1.0], [2.0]]

def nothing(prompt):
    return []

def words(prompt):
    return ["a"]

def not_finite(prompt):
    return [float("nan")]

def broken(prompt):
    return prompt.shape
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return importable(tmp_path, MODULE, monkeypatch)


def test_the_function_is_asked_for_a_prompt(module: str) -> None:
    from vllm_moe_offload.integration.embedding import UserEmbedder

    assert UserEmbedder(f"{module}:lengths")(np.array([5, 6, 7], np.int32)).tolist() == [3, 0, 0]
    assert UserEmbedder(f"{module}:Nested.half")(np.array([5], np.int32)).tolist() == [0.5]


def test_vectors_that_cannot_be_compared_are_in_different_histories(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_moe_offload.integration import history
    from vllm_moe_offload.integration.embedding import UserEmbedder

    monkeypatch.setattr(history, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    store = SimpleNamespace(identity=SimpleNamespace(facts={"checkpoint": "c", "model": "m"}))
    functions = [None, *(UserEmbedder(f"{module}:{name}") for name in ("lengths", "Nested.half", "ones"))]
    monkeypatch.setattr(import_module(module), "width", 5)
    functions.append(UserEmbedder(f"{module}:ones"))
    histories = [history.history_fingerprint(store, function) for function in functions]
    assert len(set(histories)) == 5
    assert histories == [history.history_fingerprint(store, function) for function in functions]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("missing", "cannot be imported .AttributeError"),
        ("width", "is a int, not a function"),
        ("table", r"fails on the prompt \[0\] .*shape \(2, 1\)"),
        ("nothing", r"fails on the prompt \[0\] .*shape \(0,\)"),
        ("words", r"fails on the prompt \[0\] .*could not convert"),
        ("not_finite", r"fails on the prompt \[0\] .*finite"),
        ("broken", r"fails on the prompt \[0\] \(AttributeError"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(module: str, function: str, reason: str) -> None:
    from vllm_moe_offload.integration.embedding import UserEmbedder

    with pytest.raises(ConfigError, match=rf"^embedding = '{module}:{function}' {reason}"):
        UserEmbedder(f"{module}:{function}")


def test_modules_that_are_not_there_or_broken_are_named(module: str) -> None:
    from vllm_moe_offload.integration.embedding import UserEmbedder

    with pytest.raises(ConfigError, match=r"embedding = 'no\.such:f' cannot be imported \(ModuleNotFoundError"):
        UserEmbedder("no.such:f")
    with pytest.raises(ConfigError, match=r"cannot be imported \(ZeroDivisionError"):
        UserEmbedder(f"broken_{module}:f")


@pytest.mark.parametrize(("token", "reason"), [(13, "unlucky"), (14, "2 numbers after 3 before")])
def test_a_prompt_it_fails_on_means_nothing_and_the_log_says_why(
    module: str, token: int, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_moe_offload.integration.embedding import UserEmbedder

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    embed = UserEmbedder(f"{module}:lengths")
    assert embed(np.array([token], np.int32)).tolist() == [0, 0, 0]
    assert reason in caplog.text and f"{module}:lengths" in caplog.text
