"""Tiny random MoE checkpoints on which plain vLLM and the plugin must agree, token for token."""

import platform
from pathlib import Path

import torch

from .architectures import ARCHITECTURES
from .quantized import QUANTIZED, UNSUPPORTED_BY_VLLM_CPU
from .recipe import Checkpoint, write

__all__ = ["NAMES", "REFUSED", "UNSUPPORTED_BY_VLLM_CPU", "Checkpoint", "build", "unmet"]

RECIPES = {**ARCHITECTURES, **QUANTIZED}
NAMES = tuple(RECIPES)
REFUSED = frozenset({"fp8-block-online", "int4-w4a16", "awq-int4", "gptq-int4"})
"""Those that the plugin refuses to offload."""


def build(name: str, directory: Path, seed: int = 0) -> Checkpoint:
    """Write the checkpoint `name` (one of NAMES) into `directory`. Takes well under a second; a few MB at most."""
    return write(RECIPES[name](), directory, seed)


def unmet(checkpoint: Checkpoint) -> str | None:
    """Why plain vLLM cannot run `checkpoint` on this machine, or None if it can."""
    available = {
        "amx": torch.cpu._is_amx_tile_supported(),
        "arm": platform.machine() in ("aarch64", "arm64"),
        "gpu": torch.cuda.is_available(),
    }
    if checkpoint.requires is None or available[checkpoint.requires]:
        return None
    return f"{checkpoint.path.name}: vLLM has no kernel for its experts without {checkpoint.requires}"
