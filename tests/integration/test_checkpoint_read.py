"""Which files identify a checkpoint: those that vLLM's loader reads, whatever decides that."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

FIRST, SECOND = {"w": torch.zeros(4)}, {"w": torch.ones(4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every kind of weights at once."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mixtral", "transformers_version": "4.1"}')
    save_file(FIRST, model / "model-1.safetensors")
    save_file(SECOND, model / "model-2.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        torch.save(SECOND, model / name)
    return model


def read(folder: Path, model: Any = None, load: dict[str, Any] | None = None, **config: Any) -> Any:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_moe_offload.integration.identity import checkpoint_read

    settings = {"model": str(folder), "revision": None, "hf_config_path": None, "hf_overrides": {}, **config}
    loader = DefaultModelLoader(LoadConfig(**(load or {})))
    return checkpoint_read(loader, model or SimpleNamespace(), SimpleNamespace(**settings))


def names(found: Any) -> list[str]:
    return sorted(found.files)


@pytest.mark.parametrize(
    ("load_format", "files", "mapped"),
    [
        ("auto", ["model-1.safetensors", "model-2.safetensors"], True),
        ("hf", ["model-1.safetensors", "model-2.safetensors"], True),
        ("safetensors", ["model-1.safetensors", "model-2.safetensors"], True),
        ("pt", ["model.pt"], False),
    ],
)
def test_the_load_format_chooses(folder: Path, load_format: str, files: list[str], mapped: bool) -> None:
    found = read(folder, load={"load_format": load_format})
    assert (names(found), found.mapped) == (files, mapped)


def test_consolidated_files_are_what_is_read_where_they_are(folder: Path) -> None:
    save_file(SECOND, folder / "consolidated.safetensors")
    assert names(read(folder)) == ["consolidated.safetensors"]
    assert len(names(read(folder, load={"load_format": "hf"}))) == 3


def test_an_index_chooses(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-2.safetensors"}}))
    assert names(read(folder)) == ["model-2.safetensors"]


def test_what_a_models_class_prefers_is_what_is_read(folder: Path) -> None:
    assert names(read(folder, SimpleNamespace(allow_patterns_overrides=["*-2.safetensors"]))) == ["model-2.safetensors"]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert names(read(folder)) == ["pytorch_model.bin"]
    (folder / "pytorch_model.bin").unlink()
    (folder / "training_args.bin").unlink()
    assert names(read(folder)) == ["model.pt"]
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        read(folder, SimpleNamespace(fall_back_to_pt_during_load=False))


def test_a_second_source_counts(folder: Path, tmp_path: Path) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    other = tmp_path / "language_model"
    other.mkdir()
    save_file(SECOND, other / "model.safetensors")
    found = read(folder, SimpleNamespace(secondary_weights=[DefaultModelLoader.Source(str(other), None)]))
    assert names(found) == ["1/model.safetensors", "model-1.safetensors", "model-2.safetensors"]


def test_a_modelscope_id_is_the_folder_it_was_downloaded_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import default_loader

    monkeypatch.setattr(default_loader, "maybe_download_from_modelscope", lambda model, revision: str(folder))
    found = read(Path("qwen/Qwen3-30B-A3B"))
    assert found.folder == folder and found.files == read(folder).files
    assert found.configuration == read(folder).configuration


def test_a_strategy_that_copies_is_not_mapped(folder: Path) -> None:
    assert not read(folder, load={"safetensors_load_strategy": "eager"}).mapped
    assert read(folder, load={"safetensors_load_strategy": "prefetch"}).mapped


def test_the_configuration_counts_as_it_is_written(folder: Path, tmp_path: Path) -> None:
    before = read(folder).configuration
    config = folder / "config.json"
    config.write_text('{\n"transformers_version": "5.0", "_name_or_path": "/elsewhere",\n "model_type": "mixtral"}')
    assert read(folder).configuration == before
    assert read(folder, hf_overrides={"num_local_experts": 4}).configuration != before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 4}')
    assert read(folder, hf_config_path=str(elsewhere)).configuration != before
    config.write_text('{"model_type": "mixtral", "num_local_experts": 4}')
    assert read(folder).configuration != before


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "params.json"])
def test_files_that_describe_the_quantization_count(folder: Path, name: str) -> None:
    before = read(folder).configuration
    (folder / name).write_text('{"bits": 4}')
    assert read(folder).configuration != before


def test_overrides_by_a_function_count_by_what_they_do(folder: Path) -> None:
    effective = SimpleNamespace(to_dict=lambda: {"experts": 4, "transformers_version": "4.1"})
    newer = SimpleNamespace(to_dict=lambda: {"experts": 4, "transformers_version": "5.0"})
    other = SimpleNamespace(to_dict=lambda: {"experts": 8})
    four, again, eight = (
        read(folder, hf_overrides=max, hf_config=made).configuration for made in (effective, newer, other)
    )
    assert four == again != eight
