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

from ..cache import policy_class
from ..config import ADDITIONAL_CONFIG_KEY, PLUGIN_NAME, OffloadConfig, resolve, settings_from_additional_config
from ..errors import OffloadError
from ..extensions import is_reference
from ..predict.registry import predictor_class
from ..report.engine import begin_engine
from . import seams
from .cuda.graphs import split_at_experts
from .early_checks import refuse_what_is_known
from .header_checks import refuse_by_headers
from .start_errors import expect_errors, in_one_line
from .support import refuse_unsupported

FROM_ENVIRONMENT = "moe_offload_from_environment"
"""Key of ``additional_config``: only the environment asks for offloading, perhaps for every engine of a host."""
PREPARE_ONLY = "moe_offload_prepare_only"
"""Key of ``additional_config`` that ends loading when the stores are complete (see prepare.py)."""
FROM_COMMAND_LINE = "moe_offload_from_command_line"
"""Attribute of engine arguments whose user sits at a terminal."""

logger = init_logger(__name__)


def install() -> None:
    seams.ENGINE_CONFIG.wrap(_resolve_first)


def offload_config(vllm_config: Any) -> OffloadConfig | None:
    """The settings this engine runs with, or None if it does not offload."""
    config, _ = resolve(vllm_config.additional_config, environment={})
    return config


def only_environment_asks(vllm_config: Any) -> bool:
    """Whether offloading was asked for by the environment alone, and not for this engine in particular."""
    return FROM_ENVIRONMENT in vllm_config.additional_config


def switch_off(vllm_config: Any) -> None:
    """Take the settings out of this process's configuration, which then is one that never had any."""
    ours = (ADDITIONAL_CONFIG_KEY, FROM_ENVIRONMENT)
    vllm_config.additional_config = {
        key: value for key, value in vllm_config.additional_config.items() if key not in ours
    }


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process as command line tools do: one line that says what is wrong, exit code 2, no traceback."""
    try:
        yield
    except OffloadError as error:
        print(in_one_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def _with_request(additional_config: Any) -> Any:
    """``additional_config``, switched on if a vLLM that knows ``--plugin`` itself (see patches/) was asked for us."""
    requested: list[str] = getattr(vllm.plugins, "requested_plugins", list)()
    if PLUGIN_NAME not in requested or settings_from_additional_config(additional_config) is not None:
        return additional_config
    return {ADDITIONAL_CONFIG_KEY: True} | (additional_config or {})


def _refuse_missing_classes(config: OffloadConfig) -> None:
    """Look for classes from outside while no worker has loaded anything yet.

    Raises:
        ConfigError: one cannot be imported, or is of another kind.
    """
    for name, find in ((config.policy, policy_class), (config.predictor, predictor_class)):
        if is_reference(name):
            find(name)


def _resolve_first(create: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        with exit_on_error() if hasattr(self, FROM_COMMAND_LINE) else nullcontext():
            requested = _with_request(self.additional_config)
            config, sentences = resolve(requested, os.environ)
            for sentence in sentences:
                logger.warning("%s", sentence)
            if config is None:
                return create(self, *args, **kwargs)
            if config.page:
                seams.refuse_where_moved(seams.PAGE)
            settings = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
            asked = settings_from_additional_config(requested) is not None and FROM_ENVIRONMENT not in requested
            mark = {} if asked else {FROM_ENVIRONMENT: True}
            self.additional_config = {**(self.additional_config or {}), **mark, ADDITIONAL_CONFIG_KEY: settings}
            vllm_config = create(self, *args, **kwargs)
            # A model that looks dense may still turn out to have MoE layers: then loading refuses.
            if asked or vllm_config.model_config.is_moe:
                refuse_unsupported(vllm_config)
                _refuse_missing_classes(config)
                serves = PREPARE_ONLY not in vllm_config.additional_config
                refuse_by_headers(vllm_config, config, serves)
                refuse_what_is_known(vllm_config, config, serves)
                split_at_experts(vllm_config)
            begin_engine(launches=vllm_config.parallel_config._api_process_rank < 0)
            expect_errors(vllm_config, hasattr(self, FROM_COMMAND_LINE))
            return vllm_config

    return create_engine_config
