"""vLLM's Triton kernels for MoE layers, out of the installed version's source.

They are defined anew rather than imported: where no GPU is found, vLLM puts placeholders in the place of Triton.
"""

import ast
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

_NAMES = {
    "write_zeros_to_output",
    "fused_moe_kernel",
    "fused_moe_kernel_gptq_awq",
    "invoke_fused_moe_triton_kernel",
    "invoke_fused_moe_wna16_triton_kernel",
    "get_moe_wna16_block_config",
}
_HEAD = """
import torch, triton
import triton.language as tl
from typing import Any
def warn_if_moe_use_td_ineffective(*args, **kwargs): pass
def resolve_moe_use_td(): return False
def enable_swap_ab(*args): return False
"""


def load() -> ModuleType:
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "model_executor/layers/fused_moe/fused_moe.py"
    source = path.read_text()
    lines = source.splitlines()
    parts = [_HEAD]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in _NAMES:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    assert len(parts) == 1 + len(_NAMES), "vLLM has other kernels"
    file = Path(tempfile.mkdtemp()) / "kernels_of_vllm.py"
    file.write_text("\n\n".join(parts))
    spec = importlib.util.spec_from_file_location("kernels_of_vllm", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aligned(
    ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``moe_align_block_size`` computes: choices sorted by expert, in blocks; those of no expert here last, -1."""
    flat = ids.reshape(-1).long()
    mapped = (flat if expert_map is None else expert_map[flat]).numpy()
    assert mapped.max() < experts, "such an id is written out of bounds"
    choices, blocks = [], []
    for expert in [*range(experts), -1]:
        rows = np.flatnonzero(mapped == expert)
        padding = -len(rows) % block
        choices += [*rows.tolist(), *[len(flat)] * padding]
        blocks += [expert] * ((len(rows) + padding) // block)
    return tuple(torch.tensor(values, dtype=torch.int32) for values in (choices, blocks, [len(choices)]))  # type: ignore[return-value]
