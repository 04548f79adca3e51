"""From vLLM's configuration to ours: settings are resolved once, in the process that creates the engine.

The result is written back into ``additional_config``: it reaches every process from there, and it becomes part of
the hash under which vLLM keeps compiled graphs (a graph compiled without offloading must not be used with it).
"""

import os
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from ..config import ADDITIONAL_CONFIG_KEY, OffloadConfig, resolve
from . import seams
from .support import refuse_unsupported

logger = init_logger("vllm.moe_offload")


def install() -> None:
    seams.ENGINE_CONFIG.wrap(_resolve_first)


def offload_config(vllm_config: Any) -> OffloadConfig | None:
    """The settings this engine runs with, or None if it does not offload."""
    config, _ = resolve(vllm_config.additional_config, environment={})
    return config


def _resolve_first(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, sentences = resolve(self.additional_config, os.environ)
        for sentence in sentences:
            logger.warning("moe-offload: %s", sentence)
        if config is None:
            return create(self, *args, **kwargs)
        settings = config.model_dump(mode="json", exclude_none=True)
        self.additional_config = {**(self.additional_config or {}), ADDITIONAL_CONFIG_KEY: settings}
        vllm_config = create(self, *args, **kwargs)
        refuse_unsupported(vllm_config)
        return vllm_config

    return create_engine_config
