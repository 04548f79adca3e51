"""Reading what a checkpoint says about itself, and what is said where it is damaged, cut short or something else."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import build
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.plan.checkpoint import INDEX, read_folder
from vllm_moe_offload.plan.sizes import model_sizes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("qwen3-moe", tmp_path / "model")
    return tmp_path / "model"


def shard(folder: Path) -> None:
    """Cut the one file of a checkpoint into three, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part: dict[str, torch.Tensor] = dict(list(tensors.items())[number::3])
        save_file(part, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards_weigh_what_one_file_does(folder: Path) -> None:
    whole = model_sizes(read_folder(folder), on_cpu=True)
    shard(folder)
    assert model_sizes(read_folder(folder), on_cpu=True) == whole


def test_only_headers_are_read(folder: Path) -> None:
    whole = model_sizes(read_folder(folder), on_cpu=True)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        size = file.stat().st_size
        opened.truncate(8 + length)
        opened.truncate(size)  # a hole where the weights were
    assert model_sizes(read_folder(folder), on_cpu=True) == whole


def test_a_configuration_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "qwen.json"
    shutil.copyfile(folder / "config.json", alone)
    assert read_folder(alone).tensors is None
    (folder / "model.safetensors").unlink()
    assert read_folder(folder).tensors is None
    assert model_sizes(read_folder(alone), on_cpu=True).shape == model_sizes(read_folder(folder), on_cpu=True).shape


def test_a_download_cut_short_names_what_is_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 3 files .* missing, model-00002-of-00003\.safetensors"):
        read_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 20) + b"{" * 20])
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: its header cannot be read"):
        read_folder(folder)


def test_what_is_no_checkpoint_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    said = {
        "gguf": "GGUF files are not planned for",
        "gguf/model.gguf": "GGUF files are not planned for",
        "other.json": "names neither 'architectures' nor 'model_type'",
        "broken.json": "is not JSON",
        ".": r"cannot be read \(No such file or directory\); give the folder of a checkpoint",
    }
    for name, words in said.items():
        with pytest.raises(ConfigError, match=words):
            read_folder(tmp_path / name)


def test_an_index_that_names_nothing_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ["a"]}')
    with pytest.raises(ConfigError, match="has no 'weight_map'"):
        read_folder(folder)


def test_numbers_that_are_none_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value, words in (
        ("num_experts_per_tok", "four", "num_experts_per_tok is 'four'"),
        ("num_hidden_layers", None, "has no num_hidden_layers"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ConfigError, match=words):
            model_sizes(read_folder(folder), on_cpu=True)
