"""Prompt embedders: the mean of the model's own token embeddings, or a function of the user's.

Whatever the function does, it must never fail a request or a step that serves it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from ..config import MODEL_EMBEDDING
from ..errors import ConfigError
from ..extensions import load_object
from ..trace.prompt_embedding import TokenRows, mean_embedding

logger = init_logger(__name__)

PromptEmbedding = NDArray[np.float32]
"""The vector ``[D]`` of a prompt, of any length."""
PromptEmbedder = Callable[[NDArray[np.integer]], PromptEmbedding]
"""From a prompt's token ids ``[n]``."""


def prompt_embedder(setting: str, token_rows: TokenRows | None) -> PromptEmbedder | None:
    """The prompt embedder that a setting names; None where the model's embeddings cannot be read.

    Raises:
        ConfigError: the user's function cannot be imported, called, or used.
    """
    if setting != MODEL_EMBEDDING:
        return UserEmbedder(setting)
    return None if token_rows is None else functools.partial(mean_embedding, rows=token_rows)


class UserEmbedder:
    """``package.module:function``, called with the list of a prompt's token ids."""

    def __init__(self, setting: str):
        """Import the function and try it on a prompt of one token.

        Raises:
            ConfigError: naming the setting and what is wrong.
        """
        self.setting = setting
        self._function = load_object("embedding", setting)
        if not callable(self._function):
            raise ConfigError(f"embedding = {setting!r} is a {type(self._function).__name__}, not a function")
        try:
            self.width = len(_vector(self._function([0])))
        except Exception as error:
            raise ConfigError(
                f"embedding = {setting!r} fails on the prompt [0] ({type(error).__name__}: {error}); it must take a "
                "list of token ids and return a 1-D array of numbers"
            ) from error

    def __call__(self, prompt: NDArray[np.integer]) -> PromptEmbedding:
        """float32 ``[D]``. A prompt that the function fails on gets a zero vector, and a line in the log."""
        try:
            vector = _vector(self._function(prompt.tolist()))
            if len(vector) != self.width:
                raise ValueError(f"{len(vector)} numbers after {self.width} before")
        except Exception as error:
            logger.error("embedding = %r: %s: %s", self.setting, type(error).__name__, error)
            vector = np.zeros(self.width, np.float32)
        return vector


def _vector(answer: Any) -> PromptEmbedding:
    vector = np.asarray(answer, dtype=np.float32)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError(f"an array of shape {vector.shape} instead of some finite numbers in a row")
    return vector


def token_rows(model: torch.nn.Module) -> tuple[TokenRows, int] | None:
    """The model's own token embeddings as a function of token numbers, and their length.

    None where they are not all here as plain numbers: split over ranks, or quantized.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            weight = getattr(module, "weight", None)
            if module.tp_size > 1 or weight is None or weight.dim() != 2 or not weight.is_floating_point():
                return None
            return _rows_of(weight.detach()), weight.shape[1]
    return None


def _rows_of(weight: torch.Tensor) -> TokenRows:
    """Plain numpy: it is also called from threads that must not use torch's. Rows of a device are copied once."""
    weight = weight.cpu()
    if weight.dtype != torch.bfloat16:
        table = weight.numpy()
        return lambda tokens: table[tokens].astype(np.float32)
    halves = weight.view(torch.uint16).numpy()
    return lambda tokens: (halves[tokens].astype(np.uint32) << 16).view(np.float32)
