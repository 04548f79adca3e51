"""What a command that takes MODEL is given: a folder, or a name on the Hugging Face hub. It must never download."""

import re
from pathlib import Path

from ..errors import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGURATIONS = ("config.json", "params.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def checkpoint_folder(model: str) -> Path | None:
    """Where the checkpoint lies on this machine; None for a name on the hub that has not been downloaded.

    Raises:
        ConfigError: it is neither a checkpoint's folder nor such a name.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _CONFIGURATIONS):
            raise ConfigError(f"MODEL: {model} holds no config.json; give the folder of a checkpoint")
        return folder
    if folder.is_file():
        raise ConfigError(f"MODEL: {model} is a file; give the folder of a checkpoint")
    if not _HUB_NAME.fullmatch(model):
        raise ConfigError(
            f"MODEL: {model} is no folder here; give the folder of a checkpoint, or its name on the Hugging Face hub, "
            "like org/name"
        )
    return _in_hub_cache(model)


def _in_hub_cache(model: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def weight_bytes(folder: Path) -> int | None:
    """Bytes of the files that hold a checkpoint's weights; None where there are none."""
    for pattern in _WEIGHTS:
        if sizes := [path.stat().st_size for path in folder.glob(pattern)]:
            return sum(sizes)
    return None
