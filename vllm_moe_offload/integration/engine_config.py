"""From vLLM's configuration to ours: settings are resolved once, in the process that creates the engine.

The result is written back into ``additional_config``: it reaches every process from there, and it becomes part of
the hash under which vLLM keeps compiled graphs (a graph compiled without offloading must not be used with it).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import vllm.plugins
from vllm.logger import init_logger

from ..config import ADDITIONAL_CONFIG_KEY, OffloadConfig, resolve, settings_from_additional_config
from ..errors import OffloadError
from . import seams
from .support import refuse_unsupported

PLUGIN_NAME = "moe-offload"
FROM_COMMAND_LINE = "moe_offload_from_command_line"
"""Attribute of engine arguments whose user sits at a terminal."""

logger = init_logger("vllm.moe_offload")


def install() -> None:
    seams.ENGINE_CONFIG.wrap(_resolve_first)


def offload_config(vllm_config: Any) -> OffloadConfig | None:
    """The settings this engine runs with, or None if it does not offload."""
    config, _ = resolve(vllm_config.additional_config, environment={})
    return config


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process as command line tools do: one line that says what is wrong, exit code 2, no traceback."""
    try:
        yield
    except OffloadError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _with_request(additional_config: Any) -> Any:
    """``additional_config``, switched on if a vLLM that knows ``--plugin`` itself (see patches/) was asked for us."""
    requested: list[str] = getattr(vllm.plugins, "requested_plugins", list)()
    if PLUGIN_NAME not in requested or settings_from_additional_config(additional_config) is not None:
        return additional_config
    return {ADDITIONAL_CONFIG_KEY: True} | (additional_config or {})


def _resolve_first(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        with exit_on_error() if hasattr(self, FROM_COMMAND_LINE) else nullcontext():
            config, sentences = resolve(_with_request(self.additional_config), os.environ)
            for sentence in sentences:
                logger.warning("moe-offload: %s", sentence)
            if config is None:
                return create(self, *args, **kwargs)
            settings = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
            self.additional_config = {**(self.additional_config or {}), ADDITIONAL_CONFIG_KEY: settings}
            vllm_config = create(self, *args, **kwargs)
            refuse_unsupported(vllm_config)
            return vllm_config

    return create_engine_config
