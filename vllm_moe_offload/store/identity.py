"""What makes a store foreign: one changed fact, another fingerprint. Must never call two checkpoints the same
because they merely have the same shapes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store.files import explained

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
CONFIG_PATTERNS = ("config.json", "quant*_config.json", "hf_quant_config.json", "*.index.json")
SAMPLES = 32
SAMPLE_BYTES = 4096
_CONTENT_ADDRESS = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoreIdentity:
    """Everything a store's bytes depend on.

    `facts` is JSON-like (nested dicts of str, int, float, bool, None, lists): checkpoint, vLLM version, quantization,
    method and kernel class, instruction set, dtypes, TP/EP/PP rank and world.
    `model` is the checkpoint's absolute folder, for people and for `store prune`; it is not part of the fingerprint.
    """

    facts: Mapping[str, Any]
    model: str = field(default="", compare=False)

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the sha256 of the facts as canonical JSON. Raises TypeError for a fact JSON cannot hold."""
        return hashlib.sha256(_canonical(self.facts).encode()).hexdigest()[:32]

    def differences(self, other: "StoreIdentity") -> list[str]:
        """Names of the facts that differ, nested ones dotted: `["vllm", "checkpoint.config.json"]`."""
        ours, theirs = dict(_leaves(self.facts)), dict(_leaves(other.facts))
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _canonical(value)


def checkpoint_identity(model_dir: Path, patterns: Iterable[str] = WEIGHT_PATTERNS) -> dict[str, Any]:
    """Facts that change whenever the weights under `model_dir` matching the glob `patterns` may have changed.

    Config files are hashed whole. A safetensors file counts with its size, header hash, the hash of `SAMPLES` blocks
    spread over it, and its modification time; other files with size and modification time. Fine-tunes of one model
    agree in names, sizes and headers, hence the samples and the time. Where the file is a link to a blob named by
    its own sha256 (the Hugging Face cache), that name replaces the time, so that a second download is the same.

    Raises StoreError if nothing matches or a file is unreadable or cut short.
    """
    patterns = tuple(patterns)
    with explained("read the checkpoint", model_dir):
        files = {path.relative_to(model_dir).as_posix(): path for glob in patterns for path in model_dir.glob(glob)}
        if not files:
            raise StoreError(f"no checkpoint in {model_dir}: no file matches {', '.join(patterns)}")
        configs = {path.name: _sha256(path.read_bytes()) for glob in CONFIG_PATTERNS for path in model_dir.glob(glob)}
        return configs | {name: _file_facts(path) for name, path in sorted(files.items())}


def _file_facts(path: Path) -> dict[str, Any]:
    status = path.stat()
    facts: dict[str, Any] = {"size": status.st_size}
    target = path.resolve().name
    if _CONTENT_ADDRESS.fullmatch(target):
        facts["blob"] = target
    else:
        facts["mtime_ns"] = status.st_mtime_ns
    if path.suffix == ".safetensors":
        facts |= _safetensors_facts(path, status.st_size)
    return facts


def _safetensors_facts(path: Path, size: int) -> dict[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise StoreError(f"{path} is not a whole safetensors file: {size} bytes do not hold its header")
        header = file.read(length)
        samples = hashlib.sha256()
        last = max(size - SAMPLE_BYTES, 0)
        for step in range(SAMPLES):
            file.seek(last * step // (SAMPLES - 1))
            samples.update(file.read(SAMPLE_BYTES))
    return {"header": _sha256(header), "samples": samples.hexdigest()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
