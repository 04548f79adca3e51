"""Slots are not the model's weights: whatever reads or replaces weights is refused by name and changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.live_engine import LiveEngine
from tests.models import build

PROMPT = [5, 6, 7, 8, 9]

CALLS: dict[str, tuple[Any, ...]] = {
    "save_sharded_state": ("/nonexistent",),
    "save_tensorized_model": ({"tensorizer_uri": "/nonexistent"},),
    "compute_weight_checksums": (),
    "reload_weights": (),
    "reset_weights": (),
    "init_weight_transfer_engine": ({},),
    "start_weight_update": (),
    "start_draft_weight_update": (),
    "update_weights": ({},),
    "finish_weight_update": (),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    folder = tmp_path_factory.mktemp("weights")
    model = build("mixtral", folder / "mixtral")
    live = LiveEngine(folder / "log")
    live.start(model.path, model.engine_args, cache="50%", predictor="none", store=str(folder / "stores"))
    yield live
    live.close()


def refusal(function: Callable[[], Any]) -> str:
    """What an UnsupportedError says; it must be one."""
    try:
        answer = function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"returned {answer!r}"


def parameters(worker: Any) -> dict[str, tuple[int, str]]:
    """Address and digest of every parameter of the worker's model."""
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

    model = worker.model_runner.get_model()
    digests = compute_tensor_digests(model)
    return {name: (parameter.data_ptr(), digests[name]) for name, parameter in model.named_parameters()}


def call_worker(worker: Any) -> dict[str, str]:
    return {name: refusal(lambda name=name, args=args: getattr(worker, name)(*args)) for name, args in CALLS.items()}


def test_calls_of_a_worker_are_refused_by_name(engine: LiveEngine) -> None:
    tokens, before = engine.generate([PROMPT]), engine.call(parameters)
    for name, said in engine.call(call_worker).items():
        assert said.startswith(f"UnsupportedError: moe-offload does not work with Worker.{name}: "), said
    assert engine.call(parameters) == before
    assert engine.generate([PROMPT]) == tokens


def push_weights(worker: Any) -> dict[str, str]:
    """Every way of a trainer's code inside a worker: weights of ones, which may not even be looked at."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import DefaultModelLoader, ShardedStateLoader
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.tensorizer_loader import TensorizerLoader

    runner, model = worker.model_runner, worker.model_runner.get_model()
    dense = "model.layers.0.self_attn.qkv_proj.weight"
    ones = {dense: torch.ones_like(model.get_parameter(dense))}
    layer = next(module for name, module in model.named_modules() if name.endswith(".experts.routed_experts"))

    def unread() -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("weights were taken from the trainer")
        yield

    def load_again() -> None:
        with set_current_vllm_config(worker.vllm_config):
            DefaultModelLoader(worker.load_config).load_weights(model, worker.model_config)

    return {
        "model": refusal(lambda: model.load_weights(unread())),
        "part of the model": refusal(lambda: model.model.load_weights(unread())),
        "layer": refusal(lambda: list(layer.load_weights(unread()))),
        "parameter": refusal(lambda: layer.w13_weight.weight_loader(layer.w13_weight, ones[dense], "w1", "w1", 0)),
        "load_state_dict": refusal(lambda: model.load_state_dict(ones, strict=False)),
        "model runner": refusal(lambda: runner.reload_weights(weights_iterator=unread())),
        "layerwise": refusal(lambda: initialize_layerwise_reload(model)),
        "loader": refusal(load_again),
        "state_dict": refusal(lambda: model.state_dict()),
        "save sharded": refusal(lambda: ShardedStateLoader.save_model(model, "/nonexistent")),
        "save tensorized": refusal(lambda: TensorizerLoader.save_model(model, {}, worker.model_config)),
    }


def test_weights_pushed_at_the_model_itself_are_refused_before_any_is_replaced(engine: LiveEngine) -> None:
    tokens, before = engine.generate([PROMPT]), engine.call(parameters)
    for way, said in engine.call(push_weights).items():
        assert said.startswith("UnsupportedError: moe-offload does not work with "), f"{way}: {said}"
    assert engine.call(parameters) == before
    assert engine.generate([PROMPT]) == tokens
