"""OffloadConfig: one typed, validated object, whatever source its settings come from.

Sources, most explicit first: ``--moe-offload-*`` flags and ``additional_config["moe_offload"]`` (vLLM carries both to
every process as one dict), then the environment variable ``VLLM_MOE_OFFLOAD``. Nothing given means off.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .cache import POLICY_NAMES
from .errors import ConfigError
from .extensions import is_reference
from .predict.registry import ENGINE_PREDICTORS
from .sizes import parse_size, shortened
from .store.files import named_path

PLUGIN_NAME = "moe-offload"
"""Of our entry point, by which vLLM loads us."""
ADDITIONAL_CONFIG_KEY = "moe_offload"
ENVIRONMENT_VARIABLE = "VLLM_MOE_OFFLOAD"
MODEL_EMBEDDING = "model"

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_MOST_BYTES = 2**60
_CACHE_EXAMPLES = "a share like '25%', a size like '4GiB', or 'auto'"


class CacheBudget(BaseModel):
    """Fast memory for routed experts: a share of all experts, a size in bytes, or what the machine can spare."""

    model_config = ConfigDict(frozen=True)

    share: float | None = None
    size: int | None = None

    def given(self, whole: int) -> int | None:
        """Bytes of a share of ``whole``, or of a size; None for ``auto``."""
        return self.size if self.share is None else math.ceil(whole * self.share)

    @classmethod
    def parse(cls, text: str) -> "CacheBudget":
        """Read ``25%``, ``4GiB`` or ``auto``.

        Raises:
            ValueError: it is none of these, or out of range.
        """
        text = text.strip()
        if text.lower() == "auto":
            return cls()
        if match := _SHARE.fullmatch(text):
            share = float(match[1]) / 100
            if not 0 < share <= 1:
                raise ValueError(f"{shortened(text)!r} must be above 0% and at most 100%")
            return cls(share=share)
        try:
            size = parse_size(text)
        except ValueError:
            raise ValueError(f"{shortened(text)!r} is not {_CACHE_EXAMPLES}") from None
        if size > _MOST_BYTES:
            raise ValueError(f"{shortened(text)!r} is more than any machine has; give {_CACHE_EXAMPLES}")
        if size < 1:
            raise ValueError(f"{text!r} leaves no room at all; give {_CACHE_EXAMPLES}")
        return cls(size=size)


class OffloadConfig(BaseModel):
    """Everything a user can set. Field names are the keys in all sources (flags spell ``_`` as ``-``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str = Field(
        "auto",
        description="fast memory for routed experts, a GPU's where there is one, per worker, a drafter's included: "
        f"{_CACHE_EXAMPLES}",
    )
    host_cache: str = Field(
        "auto",
        description="host memory for routed experts behind slots in the memory of a GPU, per worker: "
        f"{_CACHE_EXAMPLES} (room for all of them, or what the machine can spare)",
    )
    policy: str = Field(
        "lfu",
        description=f"eviction policy: which resident expert leaves when another must come ({', '.join(POLICY_NAMES)}, "
        "or a class of yours as 'package.module:Class'); a daemon that keeps the experts has its own --policy",
    )
    store: Path | None = Field(
        None,
        description="folder of the record stores (default: $VLLM_MOE_OFFLOAD_STORE_ROOT, else "
        "vllm-moe-offload/stores in the user's cache folder)",
    )
    predictor: str = Field(
        "history",
        description="predictor of the experts of the layers ahead, which are loaded before they are asked for "
        f"({', '.join(ENGINE_PREDICTORS)}, or a class of yours as 'package.module:Class'); one that is named is "
        "refused where it cannot work, instead of left out",
    )
    history: str | None = Field(
        None,
        description="folder of the history, the routing of earlier requests that predictors search and learn from, or "
        "'off' to keep it in memory only (default: 'history' beside the stores). Learning takes at most 5% of one "
        "core, at low priority",
    )
    embedding: str = Field(
        MODEL_EMBEDDING,
        description="prompt embedder, by which similar earlier requests are found: 'model' (the mean of the prompt's "
        "token embeddings), or 'package.module:function', given the list of a prompt's token ids and returning a 1-D "
        "array",
    )
    trace: Path | None = Field(
        None, description="file (.trace) to record every request's experts and routing weights in; replay reads it"
    )

    daemon: str = Field(
        "auto",
        description="the daemon that keeps experts for all engines of this host: 'auto' (use it if one runs), "
        "'unix:PATH' (of its socket), 'start' (start one where none runs, of the size of 'cache'), or 'off'",
    )
    page: bool = Field(
        False,
        description="serve a live page of what experts are doing at /moe-offload; its data asks for the API's key",
    )

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        return _name_or_class(value, POLICY_NAMES)

    @field_validator("predictor")
    @classmethod
    def _check_predictor(cls, value: str) -> str:
        return _name_or_class(value, ENGINE_PREDICTORS)

    @field_validator("daemon")
    @classmethod
    def _check_daemon(cls, value: str) -> str:
        if value not in ("auto", "start", "off") and not value.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{value!r} is not 'auto', 'start', 'off' or like 'unix:/run/moe-offload.sock'")
        return value

    @field_validator("store", "trace", mode="before")
    @classmethod
    def _check_path(cls, value: object) -> object:
        if not isinstance(value, str | Path):
            return value
        if not str(value).strip():
            raise ValueError("'' names nothing; give a path, or leave it out")
        return _named(str(value))

    @field_validator("trace")
    @classmethod
    def _check_trace(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".trace":
            raise ValueError(f"{str(value)!r} must end in .trace")
        return value

    @field_validator("history")
    @classmethod
    def _check_history(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("'' is neither a folder nor 'off'")
        return value if value in (None, "off") else str(_named(value))

    @field_validator("embedding")
    @classmethod
    def _check_embedding(cls, value: str) -> str:
        if value != MODEL_EMBEDDING and not is_reference(value):
            raise ValueError(f"{value!r} is neither 'model' nor like 'package.module:function'")
        return value

    @field_validator("cache", "host_cache", mode="before")
    @classmethod
    def _check_cache(cls, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not {_CACHE_EXAMPLES}")
        CacheBudget.parse(value)
        return value

    @property
    def predictor_is_explicit(self) -> bool:
        """Whether somebody asked for this predictor: then it is refused where it cannot work, instead of left out."""
        return "predictor" in self.model_fields_set

    @property
    def budget(self) -> CacheBudget:
        return CacheBudget.parse(self.cache)

    @property
    def host_budget(self) -> CacheBudget:
        return CacheBudget.parse(self.host_cache)

    @classmethod
    def complaint(cls, name: str, value: Any) -> str | None:
        """Why ``value`` cannot be the field ``name``, or None if it can."""
        try:
            cls(**{name: value})
        except ValidationError as error:
            return error.errors()[0]["msg"].removeprefix("Value error, ")
        return None

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], source: str) -> "OffloadConfig":
        """Validate ``settings``; ``source`` says in errors where they come from.

        Raises:
            ConfigError: an unknown key (naming the nearest valid one) or a bad value.
        """
        for key in settings:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
        for key, value in settings.items():
            if complaint := cls.complaint(key, value):
                raise ConfigError(f"{source}: {key} = {shortened(repr(value))}: {complaint}")
        return cls(**settings)


def _name_or_class(value: str, names: Sequence[str]) -> str:
    if value not in names and not is_reference(value):
        *most, last = map(repr, names)
        raise ValueError(f"choose {', '.join(most)} or {last}, or name a class of yours like 'package.module:Class'")
    return value


def _named(path: str) -> Path:
    try:
        return named_path(Path(path))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def settings_from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings in ``VLLM_MOE_OFFLOAD``: None if unset or empty, ``{}`` for ``1`` (on, with defaults).

    Raises:
        ConfigError: it is neither ``0``, ``1`` nor a JSON object.
    """
    text = environment.get(ENVIRONMENT_VARIABLE, "").strip()
    if text in ("", "0"):
        return None
    if text == "1":
        return {}
    try:
        settings = json.loads(text)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={text!r} is not a JSON object; write for example "
            f'{ENVIRONMENT_VARIABLE}=\'{{"cache": "25%"}}\', or 1 for the defaults'
        )
    return settings


def settings_from_additional_config(additional_config: object) -> dict[str, Any] | None:
    """The settings under ``additional_config["moe_offload"]``: None if absent or ``False``, ``{}`` for ``True``.

    Raises:
        ConfigError: the value is neither a dict nor a boolean.
    """
    settings = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, dict) else None
    if settings is None or settings is False:
        return None
    if settings is True:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            f"additional_config[{ADDITIONAL_CONFIG_KEY!r}] = {settings!r} is not a dict of settings; "
            f"write for example {{{ADDITIONAL_CONFIG_KEY!r}: {{'cache': '25%'}}}}"
        )
    return settings


def merge_settings(
    explicit: dict[str, Any], implicit: dict[str, Any], explicit_source: str, implicit_source: str
) -> tuple[dict[str, Any], list[str]]:
    """``implicit`` overridden by ``explicit``, and one sentence for every key on which they disagree."""
    sentences = [
        f"{key} is {explicit[key]!r} in {explicit_source} and {implicit[key]!r} in {implicit_source}: "
        f"{explicit_source} wins"
        for key in explicit.keys() & implicit.keys()
        if explicit[key] != implicit[key]
    ]
    return implicit | explicit, sorted(sentences)


def resolve(additional_config: object, environment: Mapping[str, str]) -> tuple[OffloadConfig | None, list[str]]:
    """The configuration all sources together give (None: off), and what the user should be told about conflicts.

    ``additional_config["moe_offload"] = False`` switches off whatever the environment says.

    Raises:
        ConfigError: a setting is unknown or bad.
    """
    given = settings_from_additional_config(additional_config)
    ambient = settings_from_environment(environment)
    if isinstance(additional_config, dict) and additional_config.get(ADDITIONAL_CONFIG_KEY) is False:
        sentences = [f"{ENVIRONMENT_VARIABLE} is set, but additional_config switches offloading off"]
        return None, sentences if ambient is not None else []
    if given is None and ambient is None:
        return None, []
    for settings, source in ((given, "additional_config['moe_offload']"), (ambient, ENVIRONMENT_VARIABLE)):
        if settings is not None:
            OffloadConfig.from_mapping(settings, source)
    merged, sentences = merge_settings(given or {}, ambient or {}, "additional_config", ENVIRONMENT_VARIABLE)
    return OffloadConfig.from_mapping(merged, "moe_offload"), sentences
