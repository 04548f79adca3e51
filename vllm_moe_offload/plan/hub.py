"""A checkpoint on the Hugging Face hub, of which only the configuration and the headers are fetched.

What an earlier download left in the cache is used where the hub cannot be asked.
"""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)

from ..errors import ConfigError
from .checkpoint import CONFIG, INDEX, Checkpoint, StoredTensor, read_config, read_folder

_WAYS_OUT = "give the folder of a checkpoint, or a config.json"


def read_model(model: str) -> Checkpoint:
    """The checkpoint called ``model``: a path, or a name on the hub.

    Raises:
        ConfigError: it is neither, the hub cannot be reached and nothing is cached, or a file is damaged.
    """
    if Path(model).expanduser().exists():
        return read_folder(Path(model).expanduser())
    if model.count("/") > 1 or model.startswith(("/", ".", "~")) or model.endswith(".json"):
        raise ConfigError(f"MODEL {model}: there is no such file or folder; {_WAYS_OUT}, or a name on the hub")
    config = _config_of(model)
    cached = _complete_snapshot(config.parent)
    if cached is not None:
        return Checkpoint(model, cached.config, cached.tensors)
    return Checkpoint(model, read_config(config), _headers_of(model))


def _config_of(model: str) -> Path:
    try:
        return Path(hf_hub_download(model, CONFIG))
    except HFValidationError as error:
        raise ConfigError(f"MODEL {model}: is no path and cannot be a name on the hub; {_WAYS_OUT}") from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"MODEL {model}: is not in the Hugging Face cache, and the hub cannot be asked (offline, or "
            f"HF_HUB_OFFLINE is set); {_WAYS_OUT}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"MODEL {model}: the hub has no such model, or shows it only to users with access (`hf auth login`); "
            f"{_WAYS_OUT}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"MODEL {model}: the hub does not give its {CONFIG} ({reason}); {_WAYS_OUT}") from error


def _complete_snapshot(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder of the cache, if its weights are there too."""
    if not (folder / INDEX).exists() and not any(folder.glob("*.safetensors")):
        return None
    try:
        found = read_folder(folder)
    except ConfigError:
        return None
    return found if found.tensors else None


def _headers_of(model: str) -> dict[str, StoredTensor] | None:
    """By ranges of the files; None where the hub cannot be asked or has no safetensors."""
    try:
        files = HfApi().get_safetensors_metadata(model).files_metadata.values()
    except (NotASafetensorsRepoError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return {
        name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for file in files for name, tensor in file.tensors.items()
    }
