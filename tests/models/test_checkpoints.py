"""Every recipe yields finite tensors that depend on the seed alone. Runs no engine."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import NAMES, build


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_finite_and_small(name: str, tmp_path: Path) -> None:
    tensors = stored(build(name, tmp_path).path)
    for tensor_name, tensor in tensors.items():
        assert tensor.float().isfinite().all(), tensor_name
        assert tensor.float().abs().max() > 0, tensor_name
    assert (tmp_path / "model.safetensors").stat().st_size < 8 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, again = build(name, tmp_path / "first"), build(name, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (first.path / file).read_bytes() == (again.path / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_other_experts(name: str, tmp_path: Path) -> None:
    tensors, others = (stored(build(name, tmp_path / str(seed), seed).path) for seed in (0, 1))
    assert tensors.keys() == others.keys()
    matrices = [key for key in tensors if ".experts." in key and tensors[key].ndim >= 2 and "zeros" not in key]
    assert any(not torch.equal(tensors[key].float(), others[key].float()) for key in matrices or tensors)


@pytest.mark.parametrize("name", NAMES)
def test_config_names_an_architecture(name: str, tmp_path: Path) -> None:
    checkpoint = build(name, tmp_path)
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert len(config["architectures"]) == 1
    assert 1 < checkpoint.top_k < checkpoint.experts
    assert 1 <= checkpoint.routed_layers <= config.get("num_hidden_layers", config.get("n_layers"))
