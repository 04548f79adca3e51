"""Kernels that are shown windows and stages: all they read per expert lies there, or the layer is refused by name."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tests.device.virtual import VirtualDevice
from tests.integration.moe_layers import EXPERTS, HIDDEN
from tests.integration.moe_methods import METHODS, Loaded, one_host
from vllm_moe_offload.errors import StoreError, UnsupportedError
from vllm_moe_offload.integration.faces import LayerFaces, attach_slots, attach_windows
from vllm_moe_offload.integration.kernel import held_by
from vllm_moe_offload.integration.tensors import (
    as_bytes,
    expert_tensors,
    names_of_tensors,
    record_layout,
    stored,
    tensors_of,
)
from vllm_moe_offload.pool.memory import HostMemory
from vllm_moe_offload.store.layout import RecordLayout
from vllm_moe_offload.store.manifest import LayerTensor
from vllm_moe_offload.windows.memory import View, WindowMemory
from vllm_moe_offload.windows.plan import WindowPlan

MEMBER, SLOTS = 5, 3


class Recorded(NamedTuple):
    layout: RecordLayout
    records: list[torch.Tensor]
    """Per component, uint8 ``[experts, nbytes]``."""
    of_layer: list[LayerTensor]


@pytest.fixture(autouse=True, scope="module")
def host() -> Iterator[None]:
    with one_host():
        yield


def recorded(loaded: Loaded) -> Recorded:
    """Load random weights, have vLLM process them, and take the records off the layer."""
    layer, method = loaded
    torch.manual_seed(7)
    method.create_real_weights(layer)
    for name, tensor in expert_tensors(layer).items():
        if tensor.dtype.is_floating_point:
            tensor.data.copy_((torch.rand(tensor.shape) if "scale" in name else torch.randn(tensor.shape)) / 8)
        else:
            tensor.data.copy_(torch.randint(0, 120, tensor.shape))
    method.real.process_weights_after_loading(layer)
    tensors, of_layer = tensors_of(layer)
    records = [torch.from_numpy(part.copy()) for part in as_bytes("layer", tensors)]
    return Recorded(record_layout(tensors), records, stored("layer", of_layer))


def without_weights(loaded: Loaded) -> None:
    layer, method = loaded
    method.real.moe_kernel = method.real.moe_quant_config = None
    method.create_placeholders(layer)


def window_memory(layout: RecordLayout) -> WindowMemory:
    plan = WindowPlan.of([EXPERTS] * 6, [SLOTS] * 6, [component.nbytes for component in layout.components])
    assert len(plan.stages) == 2
    return WindowMemory(VirtualDevice(main_is_host=True), layout, plan)


def attached(loaded: Loaded) -> tuple[WindowMemory, LayerFaces]:
    kept = recorded(loaded)
    without_weights(loaded)
    memory = window_memory(kept.layout)
    return memory, attach_windows(*loaded, memory, MEMBER, kept.of_layer)


def addresses(tensors: Any) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors if tensor.numel()}


def per_expert(layer: Any) -> list[torch.Tensor]:
    """What the layer has under any name but scales of its activations."""
    return [getattr(layer, alias) for names in names_of_tensors(layer) for alias in names if "input_scale" not in alias]


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_reads_the_view_that_is_shown_under_all_names_and_through_all_configurations(name: str) -> None:
    loaded = METHODS[name]()
    memory, faces = attached(loaded)
    layer, method = loaded
    assert memory.views == tuple(View)
    for view in (*View, View.WINDOW):
        faces.show(view)
        shown = addresses(memory.tensors(MEMBER, view))
        assert addresses(per_expert(layer)) == shown
        read = {
            held.path: held.value
            for held in held_by(method.real)
            if isinstance(held.value, torch.Tensor) and held.value.dim() and "strides" not in held.path
        }
        assert addresses(read.values()) <= shown
        assert len(read) >= (0 if name == "unquantized, CPU" else 2), read
        assert all(tensor.shape[0] == EXPERTS for tensor in read.values() if tensor.numel())


@pytest.mark.parametrize("name", METHODS)
def test_every_configuration_inside_a_kernel_is_that_of_the_view(name: str) -> None:
    """Fallback kernels have two inside, of which each reads scales from its own."""
    loaded = METHODS[name]()
    _, faces = attached(loaded)
    real = loaded[1].real
    experts = [real.moe_kernel.fused_experts]
    experts += [getattr(experts[0], inner) for inner in ("experts", "fallback_experts") if hasattr(experts[0], inner)]
    assert len(experts) == (3 if name.endswith("CUTLASS") else 1)
    configs = set()
    for view in View:
        faces.show(view)
        assert {id(kernel.quant_config) for kernel in experts} == {id(real.moe_quant_config)}
        configs.add(id(real.moe_quant_config))
    assert len(configs) == len(View)


def test_a_kernel_computes_the_same_over_a_window_over_stages_and_over_all_weights() -> None:
    loaded = METHODS["unquantized, CPU"]()
    layer, method = loaded
    layout, records, _ = recorded(loaded)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, HIDDEN, generator=generator).to(torch.bfloat16)
    weights = torch.rand(5, 2, generator=generator)
    used = [6, 1, 3]
    ids = torch.tensor([[6, 1], [1, 3], [3, 6], [6, 3], [1, 6]], dtype=torch.int32)
    expected = method.real.apply(layer, x, weights, ids, None, None).clone()
    assert expected.abs().sum() > 0
    without_weights(loaded)
    memory = window_memory(layout)
    faces = attach_windows(layer, method, memory, MEMBER)
    base = memory.plan.base(MEMBER)
    assert base > 0
    window = {base + slot: expert for slot, expert in enumerate(used)}
    window_ids = ids.clone().apply_({expert: row for row, expert in window.items()}.__getitem__)
    for view, shown_ids in ((View.STAGE_1, ids), (View.WINDOW, window_ids), (View.STAGE_0, ids)):
        faces.show(view)
        memory.clear()
        for row, expert in window.items() if view == View.WINDOW else enumerate(range(EXPERTS)):
            on_device = memory.slot(MEMBER, row - base) if view == View.WINDOW else memory.stage_row(view - 1, row)
            for target, part in zip(on_device, records, strict=True):
                target.copy_(part[expert])
        assert torch.equal(method.real.apply(layer, x, weights, shown_ids, None, None), expected)


@pytest.mark.parametrize("name", METHODS)
def test_slots_of_a_pool_are_read_under_all_names(name: str) -> None:
    loaded = METHODS[name]()
    layout, _, of_layer = recorded(loaded)
    without_weights(loaded)
    memory = HostMemory(layout, 11)
    attach_slots(*loaded, memory, 2, 9, of_layer)
    layer = loaded[0]
    rows = addresses(tensor[2:] for tensor in memory.tensors())
    assert addresses(per_expert(layer)) == rows
    assert {tensor.shape[0] for tensor in per_expert(layer) if tensor.numel()} == {9}


def test_a_layer_whose_records_are_taken_keeps_no_weights_under_a_second_name() -> None:
    loaded = METHODS["int4, Triton"]()
    recorded(loaded)
    layer = loaded[0]
    assert layer.w13_weight is layer.w13_qweight
    without_weights(loaded)
    assert {tensor.device.type for tensor in layer.parameters()} == {"meta"}
    assert not hasattr(layer, "w13_weight")


STATIC = "fp8 per tensor, Triton, static"


def with_activation_scales(loaded: Loaded, w13: list[float], w2: list[float]) -> Recorded:
    """As a checkpoint brings them: one for each expert, of which vLLM's kernels take the largest."""
    layer, method = loaded
    method.create_real_weights(layer)
    for tensor in expert_tensors(layer).values():
        tensor.data.fill_(1)
    layer.w13_input_scale.data.copy_(torch.tensor(w13))
    layer.w2_input_scale.data.copy_(torch.tensor(w2))
    method.real.process_weights_after_loading(layer)
    tensors, of_layer = tensors_of(layer)
    return Recorded(record_layout(tensors), [], stored("layer", of_layer))


@pytest.mark.parametrize("windows", [False, True])
def test_scales_of_activations_come_back_from_the_store_whatever_is_shown(windows: bool) -> None:
    w13, w2 = [0.5 + expert for expert in range(EXPERTS)], [3.25] * EXPERTS
    kept = with_activation_scales(METHODS[STATIC](), w13, w2)
    assert [(part.name, part.shape) for part in kept.of_layer] == [("w13_input_scale", ()), ("w2_input_scale", ())]
    assert not any("input" in component.name for component in kept.layout.components)
    _, method = found = METHODS[STATIC]()
    without_weights(found)
    if windows:
        faces = attach_windows(*found, window_memory(kept.layout), MEMBER, kept.of_layer)
    else:
        attach_slots(*found, HostMemory(kept.layout, 4), 0, 4, kept.of_layer)
    for view in View if windows else [None]:
        if view is not None:
            faces.show(view)
        for config in (method.real.moe_quant_config, method.real.moe_kernel.fused_experts.quant_config):
            assert (config.a1_scale.item(), config.a2_scale.item()) == (max(w13), 3.25)
            assert config.a1_scale.dim() == 0


@pytest.mark.parametrize("of_layer", [[], [LayerTensor("w13_input_scale", "float64", (), bytes(8))]])
def test_a_store_without_the_scales_that_the_kernel_reads_is_refused(of_layer: list[LayerTensor]) -> None:
    kept = with_activation_scales(METHODS[STATIC](), [1.0] * EXPERTS, [1.0] * EXPERTS)
    found = METHODS[STATIC]()
    without_weights(found)
    with pytest.raises(StoreError, match=r"the store holds .*, but the kernel reads .*'w13_input_scale', 'float32'"):
        attach_windows(*found, window_memory(kept.layout), MEMBER, of_layer)


def test_weights_that_experts_share_are_refused() -> None:
    layer, method = METHODS["fp8 per tensor, Triton"]()
    layer.quant_method = method
    method.create_real_weights(layer)
    layer.codebook = torch.zeros(3000)
    with pytest.raises(UnsupportedError, match=r"Fp8MoEMethod keeps codebook \(3000,\) for all 8 experts together"):
        tensors_of(layer)


def test_records_of_another_format_are_refused() -> None:
    loaded = METHODS["fp8 per tensor, Triton"]()
    layout, *_ = recorded(METHODS["unquantized, CPU"]())
    without_weights(loaded)
    with pytest.raises(StoreError, match="the kernel reads"):
        attach_windows(*loaded, window_memory(layout), MEMBER)


def computes_a_scale(real: Any) -> str:
    """The configuration has a product of scales, as that of FlashInfer's kernels for fp8 per tensor."""
    make = real.get_fused_moe_quant_config

    def config(layer: torch.nn.Module) -> Any:
        made = make(layer)
        made._w1.alpha_or_gscale = made._w1.scale * 0.5
        return made

    real.get_fused_moe_quant_config = config
    return r"FusedMoEQuantDesc keeps .* in moe_quant_config\._w1\.alpha_or_gscale"


def experts_with(real: Any, change: Callable[[Any], None]) -> None:
    class Changed(real.experts_cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            change(self)

    real.experts_cls = Changed


def keeps_a_scale(real: Any) -> str:
    experts_with(real, lambda experts: vars(experts).update(kept={"w1": [experts.quant_config.w1_scale]}))
    return r"list keeps .* in moe_kernel\.impl\.fused_experts\.kept\.w1\.0"


def keeps_a_computed_scale(real: Any) -> str:
    experts_with(real, lambda experts: vars(experts).update(alphas=experts.quant_config.w1_scale * 2))
    return r"Changed keeps .* in moe_kernel\.impl\.fused_experts\.alphas"


def keeps_a_reshaped_scale(real: Any) -> str:
    experts_with(real, lambda experts: vars(experts).update(flat=experts.quant_config.w1_scale.view(1, -1)))
    return r"Changed keeps .* in moe_kernel\.impl\.fused_experts\.flat"


def has_an_inner_kernel_that_computes_a_scale(real: Any) -> str:
    outer = type(real.experts_cls.__name__, (real.experts_cls,), {})
    experts_with(real, lambda experts: setattr(experts, "inner", object.__new__(outer)))
    inner_of = real.experts_cls

    class Outer(inner_of):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.inner.scales = self.quant_config.w2_scale.clone()

    real.experts_cls = Outer
    return r"TritonExperts keeps .* in moe_kernel\.impl\.fused_experts\.inner\.scales"


def keeps_a_scale_of_activations(real: Any) -> str:
    experts_with(real, lambda experts: vars(experts).update(kept=experts.quant_config.a1_scale))
    return r"Changed keeps .* in moe_kernel\.impl\.fused_experts\.kept"


KEEPS = [
    keeps_a_scale_of_activations,
    computes_a_scale,
    keeps_a_scale,
    keeps_a_computed_scale,
    keeps_a_reshaped_scale,
    has_an_inner_kernel_that_computes_a_scale,
]


@pytest.mark.parametrize("keeps", KEEPS)
def test_a_kernel_that_keeps_scales_of_its_own_is_refused_by_name(keeps: Callable[[Any], str]) -> None:
    loaded = METHODS[STATIC]()
    layout, _, of_layer = recorded(loaded)
    without_weights(loaded)
    message = keeps(loaded[1].real)
    with pytest.raises(UnsupportedError, match=f"moe-offload cannot serve layer.0: {message}; use another"):
        attach_windows(*loaded, window_memory(layout), MEMBER, of_layer)
    without_weights(loaded)
    with pytest.raises(UnsupportedError, match=message):
        attach_slots(*loaded, HostMemory(layout, 4), 0, 4, of_layer)


def test_constants_of_a_kernel_with_one_number_per_expert_are_no_reason_to_refuse() -> None:
    """CUTLASS kernels keep strides, which depend on the number of experts and not on weights."""
    loaded = METHODS["fp8 per tensor, Triton"]()
    layout, *_ = recorded(loaded)
    without_weights(loaded)
    experts_with(loaded[1].real, lambda experts: vars(experts).update(strides=torch.full((EXPERTS,), HIDDEN)))
    attach_windows(*loaded, window_memory(layout), MEMBER)
