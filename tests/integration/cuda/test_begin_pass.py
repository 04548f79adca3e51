"""A pass begins when the batch has been put together, before anything of the model is launched."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_offload.integration.cuda import batch_v2, begin_pass


class Runner:
    """Either model runner, as far as its seams see it."""

    def __init__(self, model: Any):
        self._model, self.done = model, ["put together"]
        if model is not None:
            model.moe_offload = SimpleNamespace(begin_pass=lambda: self.done.append("begun"))

    def get_model(self) -> Any:
        return self._model or SimpleNamespace()


def forward_v1(runner: Any, input_ids: int, *, positions: int) -> tuple[int, int]:
    runner.done.append("launched")
    return input_ids, positions


def inputs_v2(runner: Any, scheduler_output: Any) -> Any:
    runner.done.append(scheduler_output)
    return "inputs"


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_a_pass_begins_before_the_v1_runner_launches_or_replays_it(is_offloaded: bool) -> None:
    runner = Runner(SimpleNamespace() if is_offloaded else None)
    assert begin_pass._begin_pass_first(forward_v1)(runner, 3, positions=4) == (3, 4)
    assert runner.done == ["put together", *(["begun"] if is_offloaded else []), "launched"]


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_a_pass_begins_when_the_v2_runner_has_its_inputs(is_offloaded: bool) -> None:
    runner = Runner(SimpleNamespace() if is_offloaded else None)
    assert batch_v2._keep_inputs(inputs_v2)(runner, "scheduled") == "inputs"
    assert getattr(runner, batch_v2._INPUTS) == "inputs"
    assert runner.done == ["put together", "scheduled", *(["begun"] if is_offloaded else [])]
