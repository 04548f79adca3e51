"""What vLLM's own weight loaders make of checkpoint tensors while a layer waits for all of them."""

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from tests.integration.moe_layers import EXPERTS, HIDDEN, INTERMEDIATE, MoELayer, moe_config
from tests.integration.moe_methods import Loaded, created, gptq, one_host
from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.integration.faces import attach_slots
from vllm_moe_offload.integration.method import OffloadedMoEMethod
from vllm_moe_offload.integration.streaming import StreamedLayer
from vllm_moe_offload.integration.tensors import record_layout, stored, tensors_of
from vllm_moe_offload.pool.memory import HostMemory


@pytest.fixture(autouse=True, scope="module")
def host() -> Iterator[None]:
    with one_host():
        yield


def loading_layer(config: Any) -> MoELayer:
    """With vLLM's own loaders."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    made_here = vars(MoELayer(config)) | vars(MoELayer)
    own = {name: value for name, value in vars(RoutedExperts).items() if name not in made_here and name[:2] != "__"}
    layer: MoELayer = type("LoadingLayer", (MoELayer,), own)(config)
    layer.quant_config = layer._fused_shared_expert_quantizer = None
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert
    return layer


def loading(layer: MoELayer, real: Any) -> Loaded:
    """Without memory for weights, which vLLM's loaders are given next."""
    loaded = created(layer, real, weight_loader=layer.weight_loader)
    loaded[1].create_placeholders(layer)
    return loaded


def load(layer: MoELayer, name: str, shard: str, expert: int, value: torch.Tensor) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, value, f"experts.{name}", shard, expert)


def static_fp8() -> Loaded:
    """compressed-tensors: its loader compares each scale of activations with what it loaded before."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as module,
    )

    chosen = Fp8MoeBackend.TRITON, TritonExperts
    scheme = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    config = moe_config()
    with mock.patch.object(module, "select_fp8_moe_backend", lambda **_: chosen):
        method = module.CompressedTensorsW8A8Fp8MoEMethod(scheme, scheme, config)
    return loading(loading_layer(config), method)


def load_weights(layer: MoELayer) -> None:
    for expert in range(EXPERTS):
        for shard in ("w1", "w3"):
            load(layer, "w13_weight", shard, expert, torch.ones(INTERMEDIATE, HIDDEN).to(torch.float8_e4m3fn))
            load(layer, "w13_weight_scale", shard, expert, torch.tensor(0.5))
        load(layer, "w2_weight", "w2", expert, torch.ones(HIDDEN, INTERMEDIATE).to(torch.float8_e4m3fn))
        load(layer, "w2_weight_scale", "w2", expert, torch.tensor(0.5))


def load_activation_scales(layer: MoELayer, experts: range) -> None:
    for expert in experts:
        for shard in ("w1", "w3"):
            load(layer, "w13_input_scale", shard, expert, torch.tensor(0.25 * (1 + expert)))
        load(layer, "w2_input_scale", "w2", expert, torch.tensor([3.0]))


def test_scales_of_activations_arrive_with_the_values_of_the_checkpoint() -> None:
    layer, method = static_fp8()
    streamed = StreamedLayer(layer, partial(method.create_real_weights, layer), None)
    load_weights(layer)
    load_activation_scales(layer, range(EXPERTS))
    streamed.materialize()
    assert layer.w13_input_scale.tolist() == [0.25 * (1 + expert) for expert in range(EXPERTS)]
    assert layer.w2_input_scale.tolist() == [3.0] * EXPERTS
    method.real.process_weights_after_loading(layer)
    assert (layer.w13_input_scale.item(), layer.w13_input_scale.dim()) == (0.25 * EXPERTS, 0)


def test_vllm_s_own_check_of_these_scales_is_not_lost() -> None:
    layer, method = static_fp8()
    StreamedLayer(layer, partial(method.create_real_weights, layer), None)
    load(layer, "w13_input_scale", "w1", 3, torch.tensor(0.5))
    with pytest.raises(ValueError, match="input_scales of w1 and w3 of a layer must be equal"):
        load(layer, "w13_input_scale", "w3", 3, torch.tensor(0.75))


def test_a_missing_scale_of_activations_is_named_and_a_late_one_refused() -> None:
    layer, method = static_fp8()
    streamed = StreamedLayer(layer, partial(method.create_real_weights, layer), None)
    looked_up_before = layer.w2_input_scale
    load_weights(layer)
    load_activation_scales(layer, range(EXPERTS - 1))
    with pytest.raises(StoreError, match=rf"w1 and w3 of expert {EXPERTS - 1} \(w13_input_scale\)"):
        streamed.materialize()
    load_activation_scales(layer, range(EXPERTS - 1, EXPERTS))
    streamed.materialize()
    with pytest.raises(StoreError, match=r"names w2 of expert 2 \(w2_input_scale\) more than once"):
        looked_up_before.weight_loader(looked_up_before, torch.tensor(3.0), "experts.w2_input_scale", "w2", 2)


def gptq_loading() -> Loaded:
    """vLLM makes biases for every such layer, and takes those for absent that its loader has not seen."""
    layer, method = gptq()
    return loading(loading_layer(layer.moe_config), method.real)


def load_gptq(layer: MoELayer, biases: range) -> None:
    groups, packed = HIDDEN // 32, HIDDEN // 8
    for expert in range(EXPERTS):
        for shard, name in (("w1", "w13"), ("w3", "w13"), ("w2", "w2")):
            load(layer, f"{name}_qweight", shard, expert, torch.ones(packed, HIDDEN, dtype=torch.int32))
            load(layer, f"{name}_scales", shard, expert, torch.ones(groups, HIDDEN, dtype=torch.float16))
            load(layer, f"{name}_qzeros", shard, expert, torch.ones(groups, packed, dtype=torch.int32))
            if expert in biases:
                load(layer, f"{name}_bias", shard, expert, torch.full((HIDDEN,), 2.0 + expert))


@pytest.mark.parametrize("has_biases", [False, True])
def test_gptq_is_served_with_the_biases_that_its_checkpoint_has(has_biases: bool) -> None:
    """Also by an engine that finds the store, and so loads nothing."""
    layer, method = gptq_loading()
    recorded: list[str] = []
    streamed = StreamedLayer(
        layer, partial(method.create_real_weights, layer), lambda: recorded.append(layer.layer_name)
    )
    load_gptq(layer, range(EXPERTS if has_biases else 0))
    assert not recorded, "a bias may come until the checkpoint ends"
    streamed.materialize()
    method.real.process_weights_after_loading(layer)
    tensors, of_layer = tensors_of(layer)
    assert {name for name in tensors if "bias" in name} == ({"w13_bias", "w2_bias"} if has_biases else set())
    if has_biases:
        assert tensors["w2_bias"].unique().tolist() == [2.0 + expert for expert in range(EXPERTS)]
    found = gptq_loading()
    attach_slots(*found, HostMemory(record_layout(tensors), EXPERTS), 0, EXPERTS, stored("layer", of_layer))
    assert (found[1].real.moe_quant_config.w1_bias is not None) == has_biases


def test_a_bias_that_only_some_experts_have_is_named() -> None:
    layer, method = gptq_loading()
    streamed = StreamedLayer(layer, partial(method.create_real_weights, layer), None)
    load_gptq(layer, range(EXPERTS - 1))
    with pytest.raises(StoreError, match=rf"w1 and w3 of expert {EXPERTS - 1} \(w13_bias\)"):
        streamed.materialize()


def test_loaders_take_the_method_for_the_one_it_stands_for() -> None:
    """They decide by the name of its class and by attributes of some classes."""
    _, method = static_fp8()
    assert type(method).__name__ == "CompressedTensorsW8A8Fp8MoEMethod" and isinstance(method, OffloadedMoEMethod)
    method.real.use_global_sf = True
    assert method.use_global_sf and not hasattr(method, "weight_dtype")
