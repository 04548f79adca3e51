"""Promise 3: what cannot be offloaded is refused at start-up, by name and with the way out."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import EngineServer
from tests.integration.dense import dense_llama
from tests.models import build, unmet
from tests.models.recipe import write
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.store import StoreRoot

OFF = "or switch moe-offload off"


@pytest.mark.parametrize(
    ("arguments", "feature", "way_out"),
    [
        ({"enable_lora": True}, "LoRA (--enable-lora)", "merge the adapter into the checkpoint"),
        ({"cpu_offload_gb": 1}, "vLLM's own weight offloading (--cpu-offload-gb", "use one of the two"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weight transfer", "start an engine with the new checkpoint"),
        ({"load_format": "dummy"}, "--load-format dummy", "use one of auto, hf, safetensors"),
        ({"load_format": "sharded_state"}, "--load-format sharded_state", "use one of auto, hf, safetensors"),
    ],
)
def test_a_feature_that_does_not_work_is_named(
    tiny_moe: Path, arguments: dict[str, Any], feature: str, way_out: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    engine = EngineArgs(str(tiny_moe), additional_config={"moe_offload": {"cache": "25%"}}, **arguments)
    with pytest.raises(UnsupportedError) as error:
        engine.create_engine_config()
    assert f"does not work with {feature}" in str(error.value)
    assert way_out in str(error.value) and OFF in str(error.value)


@pytest.mark.parametrize(
    ("config", "field", "feature"),
    [
        ("parallel_config", "enable_eplb", "EPLB (--enable-eplb) and redundant experts: start without"),
        ("model_config", "enable_sleep_mode", "sleep mode (--enable-sleep-mode): start without"),
    ],
)
def test_a_feature_that_the_cpu_platform_itself_refuses_is_named_too(
    tiny_moe: Path, config: str, field: str, feature: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_moe_offload.integration.support import refuse_unsupported

    vllm_config = EngineArgs(str(tiny_moe)).create_engine_config()
    refuse_unsupported(vllm_config)
    setattr(getattr(vllm_config, config), field, True)
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported(vllm_config)
    assert f"does not work with {feature}" in str(error.value) and OFF in str(error.value)


def test_replicas_that_exchange_rows_are_refused(tiny_moe: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_moe_offload.integration.support import refuse_unsupported

    vllm_config = EngineArgs(str(tiny_moe)).create_engine_config()
    vllm_config.parallel_config.data_parallel_size = 2
    with pytest.raises(UnsupportedError, match=r"data parallelism \(--data-parallel-size\): start an engine for each"):
        refuse_unsupported(vllm_config)


def test_a_model_loaded_by_anything_but_a_starting_worker_is_named(tiny_moe: Path) -> None:
    """It would have all of its experts in memory, beside those the budget counts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    vllm_config = EngineArgs(str(tiny_moe), additional_config={"moe_offload": {}}).create_engine_config()
    with pytest.raises(UnsupportedError, match="tiny-moe is being loaded by something else than a starting worker"):
        get_model(vllm_config=vllm_config)


def test_a_drafter_with_a_load_format_that_does_not_work_is_named(tiny_moe: Path) -> None:
    """A drafter may have load settings of its own, which nobody sees before it is loaded."""
    from vllm.config.load import LoadConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    from vllm_moe_offload.integration.loading import WorkerLoading

    load_general_plugins()
    vllm_config = EngineArgs(str(tiny_moe), additional_config={"moe_offload": {}}).create_engine_config()
    with WorkerLoading(), pytest.raises(UnsupportedError, match="tiny-moe with load format dummy: use one of auto"):
        get_model(vllm_config=vllm_config, load_config=LoadConfig(load_format="dummy"))


def test_moe_layers_that_no_loader_has_made_are_named() -> None:
    from vllm_moe_offload.integration.worker import refuse_unaccounted

    with pytest.raises(UnsupportedError, match=r"cannot offload one\.experts, two\.experts: made by none of"):
        refuse_unaccounted([], ["one.experts", "two.experts"])
    refuse_unaccounted([], [])


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({"trace": "a.trace"}, True), ({"predictor": "history"}, True), ({"predictor": "none"}, False), ({}, False)],
)
def test_prediction_where_only_the_drafter_has_experts_is_refused_if_it_was_asked_for(
    settings: dict[str, str], refused: bool
) -> None:
    from vllm_moe_offload.integration.worker import refuse_to_predict

    with pytest.raises(UnsupportedError, match="only the drafter has MoE layers") if refused else nullcontext():
        refuse_to_predict(OffloadConfig.from_mapping(settings, "here"))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineServer]:
    server = EngineServer(tmp_path / "log")
    yield server
    server.close()


ROUND = {"prompts": [[1, 2, 3]], "tokens": 2}


def offloading(cache: str) -> dict[str, Any]:
    return {"skip_tokenizer_init": True, "enforce_eager": True, "additional_config": {"moe_offload": {"cache": cache}}}


def test_a_model_without_experts_is_refused(engine: EngineServer, tmp_path: Path) -> None:
    dense = write(dense_llama(), tmp_path / "dense")
    with pytest.raises(RuntimeError, match=r"UnsupportedError: .*/dense has no MoE layers.*switch moe-offload off"):
        engine.run(dense.path, offloading("25%"), [ROUND])
    assert str(dense.path) not in {info.model for info in StoreRoot().ls()}


@pytest.mark.parametrize(
    ("name", "quantization", "why"),
    [
        ("qwen3-moe", "fp8", "for which vLLM has no kernel on this machine: choose another quantization"),
        ("fp8-block-online", None, "which quantizes experts while it loads them: serve a checkpoint that is quantized"),
        ("int4-w4a16", None, "whose kernel CPUExpertsInt4 cannot compute over slots: choose another quantization"),
    ],
)
def test_a_quantization_that_cannot_be_offloaded_is_refused_by_name(
    engine: EngineServer, tmp_path: Path, name: str, quantization: str | None, why: str
) -> None:
    model = build(name, tmp_path / name)
    if reason := unmet(model):
        pytest.skip(reason)
    arguments = model.engine_args | ({} if quantization is None else {"quantization": quantization})
    with pytest.raises(RuntimeError, match=r"^UnsupportedError: moe-offload cannot serve model\.layers\.0\.") as error:
        engine.run(model.path, arguments | offloading("50%"), [ROUND])
    said = str(error.value).splitlines()[0]
    assert why in said and OFF in said


def test_a_budget_below_one_token_names_the_smallest_that_works(engine: EngineServer, tmp_path: Path) -> None:
    mixtral = build("mixtral", tmp_path / "mixtral")
    with pytest.raises(RuntimeError) as error:
        engine.run(mixtral.path, offloading("100KiB"), [ROUND])
    said = str(error.value).splitlines()[0]
    assert said.startswith("ConfigError: cache = '100KiB' gives 100.0 KiB, too little to hold the experts of one token")
    named = re.search(r"the smallest that works is '(\d+[KM]iB)' \((\d+\.\d%)\)", said)
    assert named is not None
    for budget in named.groups():
        stats = engine.run(mixtral.path, offloading(budget), [ROUND])["stats"][0]
        assert mixtral.top_k <= stats["slots"] < mixtral.experts * mixtral.routed_layers
    assert stats["slots"] == mixtral.top_k
