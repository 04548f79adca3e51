"""What makes a store foreign: one changed fact, another fingerprint.

What identifies a checkpoint is its content: the sha256 of every weight file that vLLM reads, by the file's name, and
the configuration as it is written, together with what was overridden in it. Neither the time of a file nor its folder
counts, nor the installed transformers and the defaults it fills in, nor a file that is not read. A second download, a
copy and a touched file are the same checkpoint; one changed bit is another.

A **history** depends on nothing else but that (and the pipeline stage): routing survives kernels, dtypes, ranks and
versions. A **store** depends besides on everything that decides which bytes are made of it: the model's class and the
shapes of its layers, vLLM, torch, quantization, dtype, kernel, instruction set, ranks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PASSING = frozenset({"format", "checkpoint", "model", "vllm", "torch"})
"""Facts that move on: of two stores that differ in nothing else, the older one is superseded. All others are settings
and machines, which may be in use side by side."""


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
        return digest(self.facts)

    def differences(self, other: "StoreIdentity") -> list[str]:
        """Names of the facts that differ, nested ones dotted: `["vllm", "checkpoint.config.json"]`."""
        ours, theirs = dict(_leaves(self.facts)), dict(_leaves(other.facts))
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))

    def could_replace(self, other: "StoreIdentity") -> bool:
        """Whether both are of one model in one setting on one kind of machine."""
        return bool(self.model) and self.model == other.model and _lasting(self.facts) == _lasting(other.facts)


def digest(value: Any) -> str:
    """32 hex digits of the sha256 of a JSON-like value, whatever the order of its names."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def _lasting(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in PASSING}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _canonical(value)
