"""The quantization method of an offloaded MoE layer: vLLM's own around slots instead of around all experts."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerName, direct_register_custom_op

from ..runtime import OffloadRuntime, PooledLayer
from ..windows.memory import View
from .cuda.expert_map import SlotMap, mapped_with
from .cuda.graphs import KeptOutputs
from .routing import experts_on_host, floats_on_host, on_device, own_experts
from .tensors import remove

LayerConsumer = Callable[[torch.nn.Module, "OffloadedMoEMethod"], None]


class Faces(Protocol):
    """What the kernel of a layer can be shown, where its slots are in the memory of a device."""

    def show(self, view: View) -> None:
        """The layer's parameters are the rows of ``view`` from now on."""


class OffloadedMoEMethod(FusedMoEMethodBase):
    """Stands in for ``real``, which keeps doing everything that is about numbers.

    Its class has the name of that of ``real``, and all attributes: by these vLLM's weight loaders decide how a format
    is loaded.

    Until the model is loaded it hands weights to the store. After that the layer's per-expert parameters are slots:
    its own window of the pool if all experts are resident (then ``real`` runs as ever), else the whole pool, and
    each step asks the runtime to bring the chosen experts in.

    Args:
        take_layer: called when vLLM makes the layer, which has no parameters yet.
        record: called when vLLM takes the layer for loaded.
    """

    def __new__(cls, real: FusedMoEMethodBase, *_: LayerConsumer) -> "OffloadedMoEMethod":
        return super().__new__(type(type(real).__name__, (cls,), {}))

    def __init__(self, real: FusedMoEMethodBase, take_layer: LayerConsumer, record: LayerConsumer):
        self.real = real
        self._take_layer = take_layer
        self._record = record
        self.moe = real.moe
        self._create_arguments: dict[str, Any] = {}
        self._default_dtype = torch.float32
        self.pooled: tuple[OffloadRuntime, PooledLayer] | None = None
        self.faces: Faces | None = None
        self.managed: Callable[[torch.Tensor, torch.Tensor], tuple[View, torch.Tensor]] | None = None
        """``ManagedWindows.serve`` of this layer, where a device manages its slots."""
        self.managed_map: Callable[[View], torch.Tensor | None] = lambda _: None
        """``ManagedWindows.expert_map`` of this layer."""
        self._slot_map: SlotMap | None = None
        self.report_failures: Callable[[], None] | None = None
        """Called when records of this layer could not be read, before its output is returned."""
        self.traced: tuple[OffloadRuntime, int] | None = None
        """What observes the router's choices, and the layer's number among the MoE layers, in running order."""
        self.show: Callable[[Callable[[], NDArray[np.float32]]], None] | None = None
        """Called with a function that returns the router's input ``[rows, D]``, before its choices are observed."""
        self._within_op = not current_platform.is_cpu()
        """vLLM's own opaque op is around ``apply``."""
        self.kept_outputs: KeptOutputs | None = None
        """Where the outputs of the model's layers lie for CUDA graphs that end at MoE layers."""

    def __getattr__(self, name: str) -> Any:
        if name == "real":
            raise AttributeError(name)
        return getattr(self.real, name)

    def create_weights(self, layer: torch.nn.Module, **kwargs: Any) -> None:
        self._create_arguments = kwargs
        self._default_dtype = torch.get_default_dtype()
        self._take_layer(layer, self)

    def create_placeholders(self, layer: torch.nn.Module) -> None:
        """Give the layer its parameters without memory behind them."""
        with torch.device("meta"):
            self.create_real_weights(layer)

    def create_real_weights(self, layer: torch.nn.Module, **changed: Any) -> None:
        """Give the layer the parameters vLLM would give it, in place of those it has."""
        remove(layer)
        # some formats make a tensor in the default type, which is the model's only while vLLM loads it
        outside = torch.get_default_dtype()
        torch.set_default_dtype(self._default_dtype)
        try:
            self.real.create_weights(layer=layer, **self._create_arguments | changed)
        finally:
            torch.set_default_dtype(outside)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._record(layer, self)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.pooled is None and self.managed is None and self.traced is None:
            return self.real.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if self._within_op:
            return self.compute(layer, x, topk_weights, topk_ids)
        return torch.ops.vllm.moe_offload_experts(x, topk_weights, topk_ids, LayerName(layer.layer_name))

    def compute(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """``apply`` where Python has to look at the routing: what the opaque op runs."""
        if self.faces is not None and not _serves_requests(self.managed is not None):
            return self._compute_with_nothing(layer, x, topk_weights, topk_ids)
        if self.managed is not None:
            return self._compute_managed(layer, x, topk_weights, topk_ids)
        if self.show is not None:
            self.show(lambda: floats_on_host(x))
        experts = experts_on_host(topk_ids)
        if self.traced is not None:
            runtime, number = self.traced
            runtime.observe(number, experts, floats_on_host(topk_weights))
        if self.pooled is None:
            return self.real.apply(layer, x, topk_weights, topk_ids, None, None)
        runtime, pooled_layer = self.pooled
        chosen = own_experts(experts, layer._expert_map)
        output: torch.Tensor | None = None
        with closing(runtime.serve(pooled_layer, chosen)) as waves:
            for wave in waves:
                if self.faces is not None:
                    self.faces.show(View(wave.view))
                slots = on_device(wave.slots, topk_ids).to(topk_ids.dtype)
                if wave.rows is None:
                    output = self._compute_wave(layer, x, topk_weights, slots)
                else:
                    output = torch.empty_like(x) if output is None else output
                    rows = on_device(wave.rows, x)
                    output[rows] = self._compute_wave(layer, x[rows], topk_weights[rows], slots)
        if output is None:  # no rows
            output = torch.empty_like(x)
        if runtime.has_failures and self.report_failures is not None:
            self.report_failures()
        return output

    def _compute_managed(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """The host only enqueues: nothing here looks at the routing, so graphs may be captured of it."""
        assert self.managed is not None and self.faces is not None
        view, ids = self.managed(topk_ids, topk_weights)
        self.faces.show(view)
        expert_map = self.managed_map(view)
        if expert_map is None:
            return self._compute_wave(layer, x, topk_weights, ids)
        if not self._within_op:  # kernels without a map
            return self._compute_wave(layer, x, topk_weights, expert_map[ids.long()].to(ids.dtype))
        with mapped_with(layer, expert_map):
            return self._apply(layer, x, topk_weights, ids)

    def _compute_with_nothing(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """A pass that only measures time and memory: its experts are whatever the window holds, zeros at first."""
        assert self.faces is not None
        self.faces.show(View.WINDOW)
        own = topk_ids if layer._expert_map is None else layer._expert_map[topk_ids.long()].to(topk_ids.dtype)
        return self._compute_wave(layer, x, topk_weights, own)

    def _compute_wave(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        if layer._expert_map is not None and self._within_op:
            if self._slot_map is None:
                self._slot_map = SlotMap(layer._expert_map, layer.local_num_experts)
            with mapped_with(layer, self._slot_map.expert_map):
                return self._apply(layer, x, topk_weights, self._slot_map.ids(slots))
        if layer._expert_map is not None:
            elsewhere = slots < 0
            if elsewhere.all():
                return torch.zeros_like(x)
            # CPU kernels know no "skip this choice": weight zero on an expert that is certainly loaded and pinned
            slots = torch.where(elsewhere, slots.max(), slots)
            topk_weights = torch.where(elsewhere, 0, topk_weights)
        return self._apply(layer, x, topk_weights, slots)

    def _apply(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """vLLM's kernel over what the layer shows."""
        result = self.real.apply(layer, x, topk_weights, ids, None, None)
        assert isinstance(result, torch.Tensor)
        return result

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> Any:
        return self.real.get_fused_moe_quant_config(layer)

    def maybe_roundup_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.real.maybe_roundup_sizes(*args, **kwargs)

    def uses_weight_scale_2_pattern(self) -> bool:
        return self.real.uses_weight_scale_2_pattern()

    @property
    def moe_kernel(self) -> Any:
        return self.real.moe_kernel

    @property
    def moe_quant_config(self) -> Any:
        return self.real.moe_quant_config

    @moe_quant_config.setter
    def moe_quant_config(self, quant_config: Any) -> None:
        self.real.moe_quant_config = quant_config

    @property
    def supports_internal_mk(self) -> bool:
        return self.real.supports_internal_mk

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """A wave is not a whole step, so shared experts run outside of it."""
        return False

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        return self.real.topk_indices_dtype

    @property
    def skip_forward_padding(self) -> bool:
        return self.real.skip_forward_padding

    @property
    def has_unpadded_output(self) -> bool:
        return self.real.has_unpadded_output

    @property
    def method_name(self) -> str:
        return self.real.method_name

    @property
    def is_monolithic(self) -> bool:
        return self.real.is_monolithic


def _serves_requests(in_graphs: bool) -> bool:
    """Whether the running pass serves requests, or is captured to do so in a graph with MoE layers inside."""
    context = get_forward_context()
    return context.attn_metadata is not None or (in_graphs and context.cudagraph_runtime_mode == CUDAGraphMode.FULL)


OffloadedLayers = Mapping[str, tuple[torch.nn.Module, OffloadedMoEMethod]]
"""The MoE layers of a model by their names in its store."""


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerName
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name.value].routed_experts
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


def _experts_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerName
) -> torch.Tensor:
    return torch.empty_like(x)


def register_op() -> None:
    """Make ``torch.ops.vllm.moe_offload_experts`` exist, which keeps torch.compile out of our Python. Idempotent."""
    if not hasattr(torch.ops.vllm, "moe_offload_experts"):
        direct_register_custom_op("moe_offload_experts", _experts, fake_impl=_experts_fake)
