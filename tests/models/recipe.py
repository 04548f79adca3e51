"""What a tiny random checkpoint is and how it is written; knows no architecture and never imports vllm."""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB = 512
LM_HEAD_GAIN = 6.0


@dataclass(frozen=True)
class Normal:
    """A tensor of independent normal numbers."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def draw(self, name: str, seed: int) -> torch.Tensor:
        """The numbers depend on `name` and `seed` only, so that variants of a model share their other tensors."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return (torch.randn(self.shape, generator=generator) * self.std + self.mean).to(self.dtype)


Layout = dict[str, Normal]
Tensors = dict[str, torch.Tensor]


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Recipe:
    """Everything that makes one checkpoint: `config` becomes config.json, `layout` the tensors (by checkpoint name).

    `finish` turns drawn tensors into stored ones (quantization). `requires` names the CPU feature without which plain
    vLLM refuses the model.
    """

    config: Mapping[str, Any]
    layout: Layout
    routed_layers: int
    experts: int
    top_k: int
    notes: str
    finish: Callable[[Tensors], Tensors] = unchanged
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    requires: str | None = None
    rounded_by_batch: bool = False
    """Its kernel rounds by how many tokens an expert gets at once: the same tokens only where no step is cut up."""

    def tensors(self, seed: int) -> Tensors:
        return self.finish({name: normal.draw(name, seed) for name, normal in self.layout.items()})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `engine_args` are the keyword arguments of `vllm.LLM` it needs besides its path."""

    path: Path
    engine_args: dict[str, Any]
    routed_layers: int
    experts: int
    top_k: int
    requires: str | None
    rounded_by_batch: bool = False


def write(recipe: Recipe, directory: Path, seed: int = 0) -> Checkpoint:
    """Write config.json and model.safetensors into `directory` (made if missing). Same seed, same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in recipe.tensors(seed).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(recipe.config), indent=2))
    return Checkpoint(
        path=directory,
        engine_args={"dtype": "bfloat16", "skip_tokenizer_init": True, **recipe.engine_args},
        routed_layers=recipe.routed_layers,
        experts=recipe.experts,
        top_k=recipe.top_k,
        requires=recipe.requires,
        rounded_by_batch=recipe.rounded_by_batch,
    )
