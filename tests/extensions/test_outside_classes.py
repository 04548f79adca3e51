"""Predictors and eviction policies from outside: the examples at work, and the refusals of what does not work."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.outside_module import importable
from vllm_moe_offload.cache import create_policy
from vllm_moe_offload.cli import app
from vllm_moe_offload.config import OffloadConfig, resolve
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc import protocol
from vllm_moe_offload.predict.base import ModelShape, Predictor
from vllm_moe_offload.predict.registry import predictor_for_engine, predictor_for_replay
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace_file import read_trace

EXAMPLES = Path(__file__).parents[2] / "examples"
TRACE = EXAMPLES / "traces" / "gpt-oss-20b-small.npz"
PREDICTOR, POLICY = "previous_token:PreviousToken", "lru_2:LeastRecentlyUsedTwice"
SHAPE = ModelShape(3, 8, 2)
LAYER_OF = np.repeat(np.arange(3), 8)

MODULE = """
import numpy as np
from vllm_moe_offload.cache import EvictionPolicy
from vllm_moe_offload.predict.base import Predictor, Step

class Answers(Step):
    def __init__(self, answer):
        self.answer = answer
    def observe(self, layer, experts, weights):
        pass
    def predict(self, layer):
        return self.answer

class Uniform(Predictor):
    answer = np.full((1, 8), 0.25, np.float32)
    fitted = 0
    def fit(self, trace):
        self.fitted += trace.num_tokens
    def begin(self, rows):
        return Answers(self.answer)

class Wide(Uniform):
    answer = np.zeros((1, 9), np.float32)

class Sure(Uniform):
    answer = np.full((1, 8), 2, np.float32)

class NeedsMore(Uniform):
    def __init__(self, shape, more):
        super().__init__(shape)

class Unfit(Uniform):
    def fit(self, trace):
        raise RuntimeError("too little")

class NoSteps(Predictor):
    pass

class Newest(EvictionPolicy):
    def __init__(self, layer_of):
        self.count = len(layer_of)
    def begin_step(self):
        pass
    def use(self, experts):
        pass
    def keep_scores(self, experts):
        return np.zeros(len(experts))

class Short(Newest):
    def keep_scores(self, experts):
        return np.zeros(1)

class NotNumbers(Newest):
    def keep_scores(self, experts):
        return np.full(len(experts), np.nan)

class NeedsNothing(Newest):
    def __init__(self):
        pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return importable(tmp_path, MODULE, monkeypatch)


@pytest.fixture
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def replayed(*options: str) -> dict:
    done = CliRunner().invoke(app, ["replay", str(TRACE), "--tokens", "220", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.usefixtures("_examples")
def test_the_example_predictor_saves_stalls_in_replay() -> None:
    report = replayed("--predictor", PREDICTOR, "--threshold", "0.4")
    assert report["predictor"] == PREDICTOR
    assert report["demand_miss_rate"] < report["no_prefetch"]["demand_miss_rate"]
    assert max(report["calibration_error"].values()) < 0.05, "what it says are probabilities"
    assert report["recall"]["1"]["4"]["mean"] > 2 * 4 / 32, "chance gives an eighth"


@pytest.mark.usefixtures("_examples")
def test_the_example_policy_replays_beside_belady_and_better_than_lru() -> None:
    report, lru = (replayed("--predictor", "none", "--policy", policy) for policy in (POLICY, "lru"))
    assert report["policy"] == POLICY
    assert report["belady_miss_rate"] < report["demand_miss_rate"] < lru["demand_miss_rate"]


@pytest.mark.usefixtures("_examples")
def test_a_sweep_takes_both() -> None:
    options = ["--sweep", "--slots", "25%", "--predictor", PREDICTOR, "--policy", POLICY]
    table = CliRunner().invoke(app, ["replay", str(TRACE), "--tokens", "110", "--plot", os.devnull, *options])
    assert table.exit_code == 2, "a plot needs a name with a suffix"
    points = replayed(*options)["points"]
    assert {(p["policy"], p["predictor"]) for p in points} >= {(POLICY, PREDICTOR), (POLICY, "perfect")}


def test_predictors_are_fitted_to_what_there_is(module: str) -> None:
    history = HistoryStore(ModelShape(24, 32, 4))
    history.extend(read_trace(TRACE).requests())
    for make in (predictor_for_replay, lambda *arguments: predictor_for_engine(*arguments, None)):
        with pytest.raises(ConfigError, match=r"probabilities of shape \(1, 8\) instead of \(1, 32\)"):
            make(f"{module}:Uniform", history.shape, history)
    assert predictor_for_replay(f"{module}:Uniform", SHAPE, HistoryStore(SHAPE)).fitted == 0
    made = predictor_for_engine("frequency", ModelShape(24, 32, 4), history, None)
    assert isinstance(made, Predictor) and made.popularity.max() > 2 * made.popularity.min()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no.such:P", r"cannot be imported \(ModuleNotFoundError: .*\); its module must be on the PYTHONPATH"),
        ("broken_MODULE:P", r"cannot be imported \(ZeroDivisionError"),
        ("MODULE:Missing", r"cannot be imported \(AttributeError: .*'Missing'\); .* have a class or function of that"),
        (
            "MODULE:Newest",
            r"is no Predictor; name a class that derives from vllm_moe_offload\.predict\.base\.",
        ),
        ("MODULE:np", r"is no Predictor; name a class"),
        ("MODULE:NeedsMore", r"fails on a first step \(TypeError: .*'more'\); it is made of the model's shape alone"),
        ("MODULE:NoSteps", r"fails on a first step \(TypeError: Can't instantiate abstract class"),
        ("MODULE:Wide", r"fails on a first step \(ValueError: probabilities of shape \(1, 9\) instead of \(1, 8\)\)"),
        ("MODULE:Sure", r"fails on a first step \(ValueError: probabilities that are not between 0 and 1\)"),
        ("MODULE:Unfit", r"cannot be fitted to earlier requests \(RuntimeError: too little\); its fit must"),
    ],
)
def test_a_predictor_that_does_not_work_is_refused_by_name(module: str, name: str, reason: str) -> None:
    name = name.replace("MODULE", module)
    with pytest.raises(ConfigError, match=rf"^predictor = '{name}' {reason}"):
        predictor_for_replay(name, SHAPE, HistoryStore(SHAPE))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no.such:P", r"cannot be imported \(ModuleNotFoundError: .*\); its module must be on the PYTHONPATH"),
        ("MODULE:Missing", r"cannot be imported \(AttributeError: .*'Missing'\); .* have a class or function of that"),
        (
            "MODULE:Uniform",
            r"is no EvictionPolicy; name a class that derives from vllm_moe_offload\.cache\.base\.",
        ),
        ("MODULE:NeedsNothing", r"fails on a first step \(TypeError: .*\); it is made of the layers of all experts"),
        ("MODULE:Short", r"fails on a first step \(ValueError: scores \[0\.\] instead of one float for each of 2"),
        ("MODULE:NotNumbers", r"fails on a first step \(ValueError: scores \[nan nan\] instead of one float"),
    ],
)
def test_a_policy_that_does_not_work_is_refused_by_name(module: str, name: str, reason: str) -> None:
    name = name.replace("MODULE", module)
    with pytest.raises(ConfigError, match=rf"^policy = '{name}' {reason}"):
        create_policy(name, LAYER_OF)


@pytest.mark.parametrize("key", ["predictor", "policy"])
def test_every_door_takes_the_name_of_a_class_and_imports_nothing(key: str) -> None:
    named = {key: "no.such.package:Nested.Class"}
    expected = OffloadConfig(**named)
    assert resolve({"moe_offload": named}, {})[0] == expected
    assert resolve({}, {"VLLM_MOE_OFFLOAD": json.dumps(named)})[0] == expected
    for malformed in ("no.such:", ":Class", "no such:Class", "module", "a:b:c"):
        with pytest.raises(ConfigError, match=r"or name a class of yours like 'package\.module:Class'"):
            OffloadConfig.from_mapping({key: malformed}, "here")


@pytest.mark.parametrize("option", ["--predictor", "--policy"])
def test_replay_refuses_in_one_line(option: str) -> None:
    done = CliRunner().invoke(app, ["replay", str(TRACE), option, "no.such:Class"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {option[2:]} = 'no.such:Class' cannot be imported")


def test_no_message_to_the_daemon_can_name_code() -> None:
    messages = [kind for kind in vars(protocol).values() if hasattr(kind, "__struct_fields__")]
    assert messages and not {"policy", "predictor"} & {field for kind in messages for field in kind.__struct_fields__}
