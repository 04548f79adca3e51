"""What a checkpoint says about itself: its config.json and the headers of its safetensors files. Never its weights."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8)


class StoredTensor(NamedTuple):
    """A tensor as a checkpoint's header describes it."""

    dtype: str
    """As safetensors names it: ``BF16``."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return -(-self.elements * _BITS.get(self.dtype, 8) // 8)


@dataclass(frozen=True)
class Checkpoint:
    """A model that has not been loaded."""

    name: str
    """What it is served by: a folder, or its name on the hub."""
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] | None
    """By name; None where only the configuration is at hand."""


def read_folder(path: Path) -> Checkpoint:
    """The checkpoint at ``path``: a folder, or a config.json alone (whatever it is called).

    Raises:
        ConfigError: there is no configuration, or a file is damaged or missing.
    """
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError(f"MODEL {path}: is neither a folder nor a config.json; {_reason_against(path)}")
        return Checkpoint(str(path), read_config(path), None)
    config = read_config(path / CONFIG)
    files = _weight_files(path)
    return Checkpoint(str(path), config, read_headers(files) if files else None)


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration. Raises ConfigError."""
    config = _read_json(path)
    if not isinstance(config, dict) or not (config.get("architectures") or config.get("model_type")):
        raise ConfigError(f"MODEL {path}: names neither 'architectures' nor 'model_type'; it is no model's config.json")
    return config


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files. Raises ConfigError."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    entry = opened.get_slice(name)
                    tensors[name] = StoredTensor(entry.get_dtype(), tuple(entry.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"MODEL {file}: its header cannot be read ({error}); download it again, or give the config.json alone"
            ) from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or all of them."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        return [file for file in files if not file.name.startswith("consolidated")] or files
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"MODEL {index}: has no 'weight_map' of file names; download it again")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if len(missing) == len(files):
        return []
    if missing:
        raise ConfigError(
            f"MODEL {folder}: {len(missing)} of the {len(files)} files that {INDEX} names are missing, {missing[0]} "
            "among them; finish the download, or give the config.json alone"
        )
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"MODEL {path}: cannot be read ({error.strerror}); {_reason_against(path)}") from error
    except ValueError as error:
        raise ConfigError(f"MODEL {path}: is not JSON ({error}); download it again") from error


def _reason_against(path: Path) -> str:
    if path.suffix == ".gguf" or any(path.parent.glob("*.gguf")):
        return "GGUF files are not planned for: give the folder or hub name of the model they were made of"
    return "give the folder of a checkpoint, a config.json, or a name on the Hugging Face hub"
