"""vLLM's own kernels give the same bits over a window and over a stage as over all experts of the layer.

Whatever is not a slot of the layer is NaN. bfloat16 is left out: the interpreter multiplies it as integers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton.language as tl

from tests.device.virtual import VirtualDevice
from tests.windows.interpreted import vllm_kernels
from tests.windows.managed_model import HostRecords
from vllm_moe_offload.store.layout import Component, RecordLayout
from vllm_moe_offload.windows.device_managed import DeviceManaged, ManagedLayer
from vllm_moe_offload.windows.launches import TritonKernels
from vllm_moe_offload.windows.memory import View, WindowMemory
from vllm_moe_offload.windows.plan import WindowPlan

LAYERS, EXPERTS, SLOTS, TOP_K = 3, 8, 6, 2
COMPARED = (0, LAYERS - 1)
HIDDEN, INNER, GROUP = 128, 64, 32
CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
KERNELS = vllm_kernels.load()
Tensors = dict[str, torch.Tensor]
Assignment = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


def multiply(x: torch.Tensor, weights: Tensors, assignment: Assignment) -> torch.Tensor:
    """``[rows, top_k, out]``: each row by the first matrix of its experts, in half precision or in blocks of fp8."""
    out = torch.zeros(len(x), TOP_K, weights["w13"].shape[1], dtype=torch.float16)
    scale = weights.get("w13_scale")
    x_scale = None if scale is None else torch.full((len(x), HIDDEN // 64), 0.5)
    given = x if scale is None else x.to(torch.float8_e4m3fn)
    KERNELS.invoke_fused_moe_triton_kernel(
        *(given, weights["w13"], out, x_scale, scale, None, *assignment, False, TOP_K, CONFIG),
        compute_type=tl.float16,
        use_fp8_w8a8=scale is not None,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        block_shape=None if scale is None else [64, 64],
    )
    return out


def multiply_twice(x: torch.Tensor, weights: Tensors, assignment: Assignment) -> torch.Tensor:
    """Both matrices, with routing weights."""
    inner = torch.nn.functional.silu(multiply(x, weights, assignment)[..., :INNER]).reshape(-1, INNER)
    out = torch.zeros(len(x), TOP_K, HIDDEN, dtype=torch.float16)
    routing = torch.linspace(0.1, 0.9, len(inner)).view(-1, TOP_K)
    KERNELS.invoke_fused_moe_triton_kernel(
        *(inner, weights["w2"], out, None, None, routing, *assignment, True, 1, CONFIG),
        compute_type=tl.float16,
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
    )
    return out


def multiply_int4(x: torch.Tensor, weights: Tensors, assignment: Assignment) -> torch.Tensor:
    out = torch.zeros(len(x), TOP_K, 2 * INNER, dtype=torch.float16)
    matrix, scale, zero_points = (weights[name] for name in ("w13", "w13_scale", "w13_zero_points"))
    KERNELS.invoke_fused_moe_wna16_triton_kernel(
        *(x, matrix, out, scale, zero_points, None, *assignment, False, TOP_K, CONFIG),
        compute_type=tl.float16,
        use_int8_w8a16=False,
        use_int4_w4a16=True,
        block_shape=[0, GROUP],
    )
    return out


def half() -> Tensors:
    return {
        "w13": torch.randn(LAYERS * EXPERTS, 2 * INNER, HIDDEN).half() / 8,
        "w2": torch.randn(LAYERS * EXPERTS, HIDDEN, INNER).half() / 8,
    }


def fp8() -> Tensors:
    return {
        "w13": torch.randn(LAYERS * EXPERTS, 2 * INNER, HIDDEN).to(torch.float8_e4m3fn),
        "w13_scale": torch.rand(LAYERS * EXPERTS, 2 * INNER // 64, HIDDEN // 64) + 0.5,
    }


def int4() -> Tensors:
    return {
        "w13": torch.randint(0, 256, (LAYERS * EXPERTS, 2 * INNER, HIDDEN // 2), dtype=torch.uint8),
        "w13_scale": (torch.rand(LAYERS * EXPERTS, 2 * INNER, HIDDEN // GROUP) / 16).half(),
        "w13_zero_points": torch.randint(0, 256, (LAYERS * EXPERTS, INNER, HIDDEN // GROUP), dtype=torch.uint8),
    }


@dataclass
class Format:
    weights: Callable[[], Tensors]
    multiply: Callable[[torch.Tensor, Tensors, Assignment], torch.Tensor]
    naive: bool
    """It has a path for few rows, without blocks."""


FORMATS = {
    "fp16": Format(half, multiply_twice, True),
    "fp8 blocks": Format(fp8, multiply, True),
    "int4 with zero points": Format(int4, multiply_int4, False),
}


@dataclass
class Model:
    """All weights, and the same as records behind windows; ``record_of`` where ranks share out the experts."""

    format: Format
    record_of: np.ndarray | None = None
    weights: Tensors = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.weights = self.format.weights()
        self.device = VirtualDevice(0, main_is_host=True)
        parts = {name: tensor.view(torch.uint8).reshape(len(tensor), -1) for name, tensor in self.weights.items()}
        layout = RecordLayout(tuple(Component(name, "", (), part.shape[1]) for name, part in parts.items()))
        host = HostRecords(self.device, LAYERS * EXPERTS, layout)
        for array, part in zip(host.arrays, parts.values(), strict=True):
            array[:] = part.numpy()
        plan = WindowPlan.of([EXPERTS] * LAYERS, [SLOTS] * LAYERS, [part.nbytes for part in layout.components])
        assert len(plan.stages) == 2 and plan.begins[-1] < plan.starts[-1], "the last window ends its view"
        self.memory = WindowMemory(self.device, layout, plan)
        layers = [ManagedLayer(self.memory, i, host, i * EXPERTS, self.record_of) for i in range(LAYERS)]
        ids = EXPERTS if self.record_of is None else len(self.record_of)
        kernels = TritonKernels(ids, programs=2)
        self.managed = DeviceManaged(self.device, layers, kernels, top_k=TOP_K, most_rows=16, gathered_rows=8)
        self.real_rows = torch.zeros(1, dtype=torch.int32)
        for member in range(LAYERS):
            for view in View:
                for tensor in self.memory.tensors(member, view):
                    tensor.fill_(0x7F)

    def shown(self, layer: int, view: View) -> Tensors:
        """The weights as the layer's kernel is shown them."""
        tensors = self.memory.tensors(layer, view)
        return {
            name: tensor.view(whole.dtype).view(EXPERTS, *whole.shape[1:])
            for tensor, (name, whole) in zip(tensors, self.weights.items(), strict=True)
        }

    def compare(self, layer: int, view: View, ids: torch.Tensor, rewritten: torch.Tensor) -> None:
        """The layer's kernel over ``view`` and over all experts, naive and in blocks."""
        if layer not in COMPARED:
            return
        x = torch.randn(len(ids), HIDDEN).half()
        whole = {name: tensor[layer * EXPERTS : (layer + 1) * EXPERTS] for name, tensor in self.weights.items()}
        plain_map = None if self.record_of is None else torch.from_numpy(self.record_of)
        window_map = self.managed.expert_map(layer, view)
        narrow = view == View.WINDOW and plain_map is None
        for naive in {False, self.format.naive and narrow}:
            plain = self.format.multiply(x, whole, assignment(ids, plain_map, naive))
            windowed = self.format.multiply(x, self.shown(layer, view), assignment(rewritten, window_map, naive))
            assert plain.isfinite().all() and plain.abs().max() > 0.01
            assert torch.equal(plain, windowed)


def assignment(ids: torch.Tensor, expert_map: torch.Tensor | None, naive: bool) -> Assignment:
    if naive:
        count = torch.tensor([ids.numel() * CONFIG["BLOCK_SIZE_M"]], dtype=torch.int32)
        return None, ids.reshape(-1), count
    return vllm_kernels.aligned(ids, CONFIG["BLOCK_SIZE_M"], EXPERTS, expert_map)


def routed(rng: np.random.Generator, rows: int, experts: int = EXPERTS) -> torch.Tensor:
    chosen = [rng.choice(experts, TOP_K, replace=False) for _ in range(rows)]
    return torch.tensor(np.array(chosen), dtype=torch.int32)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_over_windows_and_stages(name: str) -> None:
    model = Model(FORMATS[name])
    rng = np.random.default_rng(0)
    for rows in (3, 4, 9):
        model.real_rows.fill_(rows)
        for layer in range(LAYERS):
            ids = routed(rng, rows)
            if rows <= model.managed.narrow_rows:
                model.compare(layer, View.WINDOW, ids, model.managed.launch(layer, ids, ids.float(), model.real_rows))
            else:
                model.compare(layer, model.managed.launch_wide(layer, ids, ids.float(), model.real_rows), ids, ids)
        model.managed.read_back(rows)


@pytest.mark.parametrize("name", ["fp16", "fp8 blocks"])
def test_the_same_bits_where_ranks_share_out_the_experts(name: str) -> None:
    """Choices of other ranks are zero, as over all of this rank's experts."""
    record_of = np.full(2 * EXPERTS, -1, np.int32)
    record_of[EXPERTS:] = np.arange(EXPERTS)
    model = Model(FORMATS[name], record_of)
    rng = np.random.default_rng(1)
    for rows in (2, 6):
        model.real_rows.fill_(rows)
        for layer in range(LAYERS):
            ids = routed(rng, rows, 2 * EXPERTS)
            ids[0, 0] = 2 * EXPERTS - 1
            if rows <= model.managed.narrow_rows:
                model.compare(layer, View.WINDOW, ids, model.managed.launch(layer, ids, ids.float(), model.real_rows))
            else:
                model.compare(layer, model.managed.launch_wide(layer, ids, ids.float(), model.real_rows), ids, ids)


def test_another_configuration_gives_other_bits() -> None:
    """So a kernel that is shown another number of rows than plain vLLM's may compute something else."""
    model = Model(FORMATS["fp16"])
    ids = routed(np.random.default_rng(2), 3)
    x = torch.randn(3, HIDDEN).half()
    whole = {name: tensor[:EXPERTS] for name, tensor in model.weights.items()}
    before = multiply(x, whole, assignment(ids, None, False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG, "BLOCK_SIZE_K", 32)
        assert not torch.equal(before, multiply(x, whole, assignment(ids, None, False)))
