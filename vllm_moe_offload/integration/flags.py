"""``--plugin NAME`` and ``--moe-offload-*``: one flag per field of OffloadConfig, folded into ``additional_config``."""

import argparse
import functools
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from pydantic.fields import FieldInfo
from vllm.logger import init_logger

from ..config import (
    ADDITIONAL_CONFIG_KEY,
    PLUGIN_NAME,
    OffloadConfig,
    merge_settings,
    resolve,
    settings_from_additional_config,
)
from . import seams
from .engine_config import FROM_COMMAND_LINE, exit_on_error

_PREFIX = "moe_offload_"

logger = init_logger(__name__)


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
                default=argparse.SUPPRESS,
                metavar="NAME",
                type=_installed_plugin,
                help=f"Enable an installed plugin by name (repeatable). '{PLUGIN_NAME}' switches MoE offloading on.",
            )
        for name, field in OffloadConfig.model_fields.items():
            value: dict[str, Any] = (
                {"action": "store_true"}
                if field.annotation is bool
                else {"metavar": name.upper(), "type": functools.partial(_value_of, name)}
            )
            group.add_argument(
                f"--{(_PREFIX + name).replace('_', '-')}", default=argparse.SUPPRESS, help=_help(field), **value
            )
        return parser

    return add


def _fold_flags(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def from_args(cls: type, args: argparse.Namespace) -> Any:
        given = {name: getattr(args, _PREFIX + name, None) for name in OffloadConfig.model_fields}
        flags = {name: value for name, value in given.items() if value is not None}
        named = getattr(args, "plugin", None) or []
        with exit_on_error():
            if flags or PLUGIN_NAME in named:
                args.additional_config = _with_flags(args.additional_config or {}, flags)
            resolve(getattr(args, "additional_config", None), os.environ)
        engine_args = from_cli_args(cls, args)
        setattr(engine_args, FROM_COMMAND_LINE, True)
        return engine_args

    return from_args


def _with_flags(additional_config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """``additional_config`` with the flags folded in; a flag wins over the same key given there."""
    OffloadConfig.from_mapping(flags, "--moe-offload-* flags")
    settings = settings_from_additional_config(additional_config) or {}
    merged, sentences = merge_settings(flags, settings, "the --moe-offload flags", "--additional-config")
    for sentence in sentences:
        logger.warning("%s", sentence)
    return {**additional_config, ADDITIONAL_CONFIG_KEY: merged or True}


def _help(field: FieldInfo) -> str:
    default = "" if field.default in (None, False) else f" Default: {field.default}."
    return f"{field.description}.{default} Switches MoE offloading on.".replace("%", "%%")


def _installed_plugin(name: str) -> str:
    installed = sorted({point.name for point in entry_points(group="vllm.general_plugins")})
    if name not in installed:
        raise argparse.ArgumentTypeError(f"no vLLM plugin {name!r} is installed; installed: {', '.join(installed)}")
    return name


def _value_of(name: str, text: str) -> str:
    if complaint := OffloadConfig.complaint(name, text):
        raise argparse.ArgumentTypeError(complaint)
    return text
