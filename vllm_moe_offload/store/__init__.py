"""The records of one model on disk: written once, atomically, and checked before they are trusted.

Bytes in, bytes out: this room knows nothing of tensors, engines or devices, and must never serve a record
of another checkpoint, another kernel or an unfinished build.
"""

from vllm_moe_offload.store.checkpoint import FileDigests
from vllm_moe_offload.store.identity import StoreIdentity
from vllm_moe_offload.store.layout import ALIGNMENT, Component, RecordLayout
from vllm_moe_offload.store.manifest import FORMAT_VERSION, LayerEntry, LayerTensor
from vllm_moe_offload.store.reader import Store, UnusableStoreError
from vllm_moe_offload.store.root import StoreInfo, StoreRoot, default_root
from vllm_moe_offload.store.writer import StoreWriter

__all__ = [
    "ALIGNMENT",
    "FORMAT_VERSION",
    "Component",
    "FileDigests",
    "LayerEntry",
    "LayerTensor",
    "RecordLayout",
    "Store",
    "StoreIdentity",
    "StoreInfo",
    "StoreRoot",
    "StoreWriter",
    "UnusableStoreError",
    "default_root",
]
