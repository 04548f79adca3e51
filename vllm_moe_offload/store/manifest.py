"""What a store says about itself, as JSON. Must never be trusted without its own checksum."""

import hashlib
from typing import Any

import msgspec

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store.layout import RecordLayout

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
RECORDS_NAME = "records.bin"


class OutdatedError(StoreError):
    """What was written by an earlier version of this package, in a form that no engine of this one can use."""


class LayerTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A small tensor that a layer has for all its experts together, such as a scale of activations."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One MoE layer: its records lie back to back from byte `offset` of the record file.

    `first_record` is the index of its expert 0 among all records of the store; `checksums` holds one
    `record_digest` per expert. `tensors` are kept here, under the manifest's own checksum.
    """

    name: str
    experts: int
    layout: RecordLayout
    first_record: int
    offset: int
    checksums: list[int]
    tensors: list[LayerTensor] = []

    @property
    def end(self) -> int:
        return self.offset + self.experts * self.layout.record_bytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything but the bytes. `facts` and `model` are those of the StoreIdentity; `checksum` covers the rest."""

    format_version: int
    checksum: str
    model: str
    facts: dict[str, Any]
    layers: list[LayerEntry]

    @property
    def data_bytes(self) -> int:
        return self.layers[-1].end if self.layers else 0


class _Versioned(msgspec.Struct):
    format_version: int


def _checksum(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, checksum=""))).hexdigest()


def encode(model: str, facts: dict[str, Any], layers: list[LayerEntry]) -> bytes:
    manifest = Manifest(FORMAT_VERSION, "", model, facts, layers)
    return msgspec.json.encode(msgspec.structs.replace(manifest, checksum=_checksum(manifest)))


def decode(text: bytes) -> Manifest:
    """Raises StoreError, saying what is wrong, for anything but an intact manifest of this format version."""
    try:
        version = msgspec.json.decode(text, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            kind = OutdatedError if version < FORMAT_VERSION else StoreError
            raise kind(f"it has format version {version}, this package reads {FORMAT_VERSION}")
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"its {MANIFEST_NAME} cannot be parsed ({error})") from error
    if manifest.checksum != _checksum(manifest):
        raise StoreError(f"its {MANIFEST_NAME} does not match its own checksum")
    return manifest
