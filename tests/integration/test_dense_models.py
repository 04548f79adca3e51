"""A model without MoE layers: where only the environment, perhaps a whole host's, asks for offloading, it is served."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live_engine import LiveEngine
from tests.integration.dense import dense_llama
from tests.models.recipe import Checkpoint, write
from vllm_moe_offload.config import ADDITIONAL_CONFIG_KEY, ENVIRONMENT_VARIABLE
from vllm_moe_offload.errors import UnsupportedError

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(dense_llama(), tmp_path_factory.mktemp("dense"))


def engine_config(model: Path, **arguments: Any) -> Any:
    """What vLLM makes of engine arguments before any process starts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    engine = EngineArgs(str(model), skip_tokenizer_init=True, **arguments)
    engine.create_engine_config()
    return engine.create_engine_config()  # vLLM's servers make it more than once of the same arguments


def test_the_environment_does_not_refuse_what_a_dense_model_can_have(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    assert engine_config(dense.path, enable_lora=True).lora_config is not None
    assert engine_config(dense.path, load_format="dummy").load_config.load_format == "dummy"


def test_the_environment_refuses_for_a_moe_model_what_a_flag_refuses(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    with pytest.raises(UnsupportedError, match=r"does not work with LoRA"):
        engine_config(tiny_moe, enable_lora=True)


def test_settings_of_this_engine_refuse_for_a_dense_model_too(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    with pytest.raises(UnsupportedError, match=r"does not work with LoRA"):
        engine_config(dense.path, enable_lora=True, additional_config={ADDITIONAL_CONFIG_KEY: {"cache": "25%"}})


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a host whose every engine is to offload, remember, record, and share a daemon."""
    settings = {
        "cache": "25%",
        "store": str(tmp_path / "stores"),
        "history": str(tmp_path / "history"),
        "trace": str(tmp_path / "recorded.trace"),
        "daemon": "start",
    }
    (tmp_path / "run").mkdir(mode=0o700)
    yield {ENVIRONMENT_VARIABLE: json.dumps(settings), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.log", "plain.log", "run"]
    assert not list((tmp_path / "run").iterdir()), "a daemon was started"


def test_a_dense_model_is_served_as_ever(
    dense: Checkpoint, tiny_moe: Path, host: dict[str, str], tmp_path: Path
) -> None:
    plain = LiveEngine(tmp_path / "plain.log", VLLM_PLUGINS="")
    plain.start(dense.path, dense.engine_args)
    expected, config = plain.generate([PROMPT]), plain.call(additional_config)
    plain.close()
    engine = LiveEngine(tmp_path / "engine.log", **host)
    engine.start(dense.path, dense.engine_args)
    assert (engine.generate([PROMPT]), engine.call(additional_config)) == (expected, config)
    assert engine.log.read_text().count("has no MoE layers: it is served as without VLLM_MOE_OFFLOAD") == 1
    engine.stop()
    engine.start(dense.path, {"runner": "pooling", "tokenizer": str(tiny_moe)})
    engine.close()


def additional_config(worker: Any) -> tuple[str, str]:
    """The worker's, and the hash under which its graphs are kept."""
    return str(worker.vllm_config.additional_config), worker.vllm_config.compute_hash()
