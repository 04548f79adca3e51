"""What a model weighs: from headers to the byte, from config.json nearly. What stores hold is compared in tests/e2e."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models import NAMES, build
from tests.models.deepseek import deepseek_v3, deepseek_v3_with_mtp
from tests.models.recipe import write
from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.plan.checkpoint import Checkpoint, read_folder
from vllm_moe_offload.plan.sizes import model_sizes

UNPACKED = {"int4-w4a8"}
"""Stored with a byte for four bits, which no configuration says."""


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_either_dense_or_an_experts(name: str, tmp_path: Path) -> None:
    made = build(name, tmp_path)
    sizes = model_sizes(read_folder(tmp_path), on_cpu=False)
    assert sizes.exact
    assert sizes.shape == (made.routed_layers, made.experts, made.top_k)
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    payload = (tmp_path / "model.safetensors").stat().st_size - header
    assert abs(payload - sizes.dense_bytes - sizes.expert_bytes) <= sizes.experts
    assert 0 < sizes.dense_read_bytes < sizes.dense_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_alone_says_nearly_the_same(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    checkpoint = read_folder(tmp_path)
    exact = model_sizes(checkpoint, on_cpu=False)
    alone = model_sizes(replace(checkpoint, tensors=None), on_cpu=False)
    assert not alone.exact
    assert alone.shape == exact.shape
    if name not in UNPACKED:
        assert alone.record_bytes == pytest.approx(exact.record_bytes, rel=0.06)
    assert alone.dense_bytes == pytest.approx(exact.dense_bytes, rel=0.25)


def test_layers_for_drafting_are_counted_apart(tmp_path: Path) -> None:
    write(deepseek_v3(), tmp_path / "plain")
    write(deepseek_v3_with_mtp(), tmp_path / "mtp")
    plain, with_mtp = (model_sizes(read_folder(tmp_path / name), on_cpu=False) for name in ("plain", "mtp"))
    assert plain.draft_bytes == 0 < with_mtp.draft_bytes
    assert replace(with_mtp, draft_bytes=0) == plain


def test_published_sizes() -> None:
    """Qwen3-30B-A3B has 30.5 B parameters, 3.3 B of them active; Mixtral-8x7B 46.7 B."""
    qwen = Checkpoint("qwen", json.loads(QWEN3_30B), None)
    sizes = model_sizes(qwen, on_cpu=False)
    assert (sizes.expert_bytes + sizes.dense_bytes) / 2 == pytest.approx(30.5e9, rel=0.01)
    active = sizes.dense_bytes / 2 + 48 * 8 * sizes.expert_parameters
    assert active == pytest.approx(3.3e9, rel=0.03)
    mixtral = model_sizes(Checkpoint("mixtral", json.loads(MIXTRAL), None), on_cpu=False)
    assert (mixtral.expert_bytes + mixtral.dense_bytes) / 2 == pytest.approx(46.7e9, rel=0.01)


def test_a_dense_model_is_refused() -> None:
    config = json.loads(MIXTRAL) | {"num_local_experts": None, "architectures": ["MistralForCausalLM"]}
    with pytest.raises(UnsupportedError, match=r"MistralForCausalLM has no routed experts.*plain vLLM"):
        model_sizes(Checkpoint("dense", config, None), on_cpu=False)


QWEN3_30B = """{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
"intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "mlp_only_layers": []}"""
MIXTRAL = """{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16"}"""
