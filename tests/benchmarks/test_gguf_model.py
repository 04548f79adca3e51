"""gguf_model.py: what is written has the names, shapes and values that llama.cpp expects of the checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

gguf = pytest.importorskip("gguf", reason="GGUF files are read back with the package gguf: pip install gguf")
from gguf_model import write_gguf  # noqa: E402 - needs gguf


@pytest.fixture(scope="module")
def checkpoint(tiny_moe: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in tiny_moe.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    return tensors


def _values(tensor: "gguf.ReaderTensor") -> np.ndarray:
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).float().numpy()
    return np.array(tensor.data, np.float32)


@pytest.mark.parametrize("type_name", ["bf16", "f16"])
def test_every_weight_is_found_by_its_name_with_its_values(
    type_name: str, tmp_path: Path, tiny_moe: Path, checkpoint: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "model.gguf"
    write_gguf(out, tiny_moe, type_name)
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = json.loads((tiny_moe / "config.json").read_text())
    assert len(tensors) == 2 + 12 * config["num_hidden_layers"]
    assert reader.fields["general.architecture"].contents() == "qwen3moe"
    assert reader.fields["qwen3moe.expert_used_count"].contents() == config["num_experts_per_tok"]
    assert reader.fields["qwen3moe.vocab_size"].contents() == config["vocab_size"]

    for name, ours, shape in [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("output_norm.weight", "model.norm.weight", None),
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", None),
        ("blk.3.ffn_gate_inp.weight", "model.layers.3.mlp.gate.weight", gguf.GGMLQuantizationType.F32),
    ]:
        expected = checkpoint[ours].float().numpy()
        found = _values(tensors[name])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2**-24)
        if shape is not None:
            assert tensors[name].tensor_type == shape
    for projection in ("gate", "up", "down"):
        stacked = _values(tensors[f"blk.7.ffn_{projection}_exps.weight"])
        assert len(stacked) == config["num_experts"]
        for expert in (0, 2, 10, config["num_experts"] - 1):
            expected = checkpoint[f"model.layers.7.mlp.experts.{expert}.{projection}_proj.weight"].float().numpy()
            np.testing.assert_allclose(stacked[expert], expected, rtol=2**-11, atol=2**-24)


def test_an_existing_file_is_kept(tmp_path: Path, tiny_moe: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(b"mine")
    write_gguf(out, tiny_moe, "bf16")
    assert out.read_bytes() == b"mine"


def test_another_architecture_is_refused_by_name(tmp_path: Path, tiny_moe: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_moe, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(ValueError, match="'mixtral'; only qwen3_moe"):
        write_gguf(tmp_path / "model.gguf", other, "bf16")
    assert not (tmp_path / "model.gguf").exists()
