"""Tiny random MoE checkpoints on which plain vLLM and the plugin must agree, token for token."""

from pathlib import Path

from .architectures import ARCHITECTURES
from .quantized import QUANTIZED
from .recipe import Checkpoint, write

RECIPES = {**ARCHITECTURES, **QUANTIZED}
NAMES = tuple(RECIPES)


def build(name: str, directory: Path, seed: int = 0) -> Checkpoint:
    """Write the checkpoint `name` (one of NAMES) into `directory`. Takes well under a second; a few MB at most."""
    return write(RECIPES[name](), directory, seed)
