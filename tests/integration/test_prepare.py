"""``vllm-moe-offload prepare``: the store it builds is the one an engine looks for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.engines import EngineServer
from tests.integration.dense import dense_llama
from tests.models import build
from tests.models.recipe import write
from vllm_moe_offload.sizes import size_text
from vllm_moe_offload.store import StoreRoot


def prepare(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_moe_offload", "prepare", *words], capture_output=True, text=True, timeout=300
    )


def test_an_engine_finds_what_was_prepared_and_builds_nothing(tmp_path: Path) -> None:
    mixtral = build("mixtral", tmp_path / "mixtral")
    root = StoreRoot(tmp_path / "stores")
    result = prepare(str(mixtral.path), "--store", str(root.path), "--", "--dtype", "bfloat16", "--skip-tokenizer-init")
    assert result.returncode == 0, result.stderr[-4000:]
    (built,) = root.ls()
    assert built.state == "complete"
    said = re.search(r"^built (.*) in (.*)\nready after \d+\.\d s$", result.stdout, re.MULTILINE)
    assert said is not None
    assert said[2] == str(built.path)
    assert said[1] == size_text((built.path / "records.bin").stat().st_size)

    engine = EngineServer(tmp_path / "log")
    offload = {"cache": "25%", "store": str(root.path)}
    arguments = mixtral.engine_args | {"enforce_eager": True, "additional_config": {"moe_offload": offload}}
    stats = engine.run(mixtral.path, arguments, [{"prompts": [[1, 2, 3]], "tokens": 2}])["stats"][0]
    engine.close()
    assert stats["layers"] == mixtral.routed_layers
    (found,) = root.ls()
    assert (found.path, found.built, found.size) == (built.path, built.built, built.size)
    assert found.used > built.used
    assert f"experts come from store {built.path}" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "--enable-lora"], "error: UnsupportedError: moe-offload does not work with LoRA"),
        (["--", "--moe-offload-cache", "lots"], "error: argument --moe-offload-cache: 'lots' is not a share"),
        (
            ["--", "--skip-tokenizer-init"],
            "error: UnsupportedError: moe-offload is on, but {model} has no MoE layers it could offload",
        ),
    ],
)
def test_what_cannot_be_served_is_not_prepared(tmp_path: Path, words: list[str], said: str) -> None:
    model = write(dense_llama(), tmp_path / "dense").path
    result = prepare(str(model), "--store", str(tmp_path / "stores"), *words)
    assert result.returncode == 2
    assert said.format(model=model) in result.stderr
    assert "Traceback" not in result.stderr
    assert StoreRoot(tmp_path / "stores").ls() == []
