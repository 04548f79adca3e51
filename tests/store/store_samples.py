"""A small store to build."""

import numpy as np

from vllm_moe_offload.store import Component, RecordLayout, Store, StoreIdentity, StoreRoot, StoreWriter

LAYOUT = RecordLayout((Component("w13", "bfloat16", (3, 1000), 6000), Component("scale", "float32", (1,), 4)))
EXPERTS = 5
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def layer_bytes(seed: int, layout: RecordLayout = LAYOUT, experts: int = EXPERTS) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (experts, part.nbytes), np.uint8) for part in layout.components]


def build(root: StoreRoot, identity: StoreIdentity) -> Store:
    writer = root.open_or_build(identity)
    assert isinstance(writer, StoreWriter)
    for seed, name in enumerate(LAYERS):
        writer.add_layer(name, LAYOUT, layer_bytes(seed))
    return writer.finish()
