"""``--plugin NAME`` and ``--moe-offload-*``: one flag per field of OffloadConfig, folded into ``additional_config``."""

import argparse
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vllm.logger import init_logger

from ..config import ADDITIONAL_CONFIG_KEY, OffloadConfig, merge_settings, settings_from_additional_config
from ..errors import ConfigError
from . import seams

PLUGIN_NAME = "moe-offload"
_PREFIX = "moe_offload_"

logger = init_logger("vllm.moe_offload")


def install() -> None:
    seams.CLI_ARGUMENTS.wrap(_add_flags)
    seams.CLI_VALUES.wrap(_fold_flags)


def _add_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def add(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            title="MoE offloading", description="Serve MoE models larger than fast memory (vllm-moe-offload)."
        )
        if "--plugin" not in parser._option_string_actions:
            group.add_argument(
                "--plugin",
                action="append",
                metavar="NAME",
                help=f"Enable an installed plugin by name (repeatable). '{PLUGIN_NAME}' switches MoE offloading on.",
            )
        for name, field in OffloadConfig.model_fields.items():
            group.add_argument(
                f"--{(_PREFIX + name).replace('_', '-')}",
                default=None,
                metavar=name.upper(),
                help=f"{field.description}. Default: {field.default}. Switches MoE offloading on.",
            )
        return parser

    return add


def _fold_flags(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def from_args(cls: type, args: argparse.Namespace) -> Any:
        given = {name: getattr(args, _PREFIX + name, None) for name in OffloadConfig.model_fields}
        flags = {name: value for name, value in given.items() if value is not None}
        named = getattr(args, "plugin", None) or []
        _check_installed(named)
        if flags or PLUGIN_NAME in named:
            args.additional_config = _with_flags(args.additional_config or {}, flags)
        return from_cli_args(cls, args)

    return from_args


def _with_flags(additional_config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """``additional_config`` with the flags folded in; a flag wins over the same key given there."""
    OffloadConfig.from_mapping(flags, "--moe-offload-* flags")
    settings = settings_from_additional_config(additional_config) or {}
    merged, sentences = merge_settings(flags, settings, "the --moe-offload flags", "--additional-config")
    for sentence in sentences:
        logger.warning("moe-offload: %s", sentence)
    return {**additional_config, ADDITIONAL_CONFIG_KEY: merged or True}


def _check_installed(named: list[str]) -> None:
    installed = sorted({point.name for point in entry_points(group="vllm.general_plugins")})
    for name in named:
        if name not in installed:
            raise ConfigError(f"--plugin {name}: no such vLLM plugin is installed; installed: {', '.join(installed)}")
