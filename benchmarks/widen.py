"""Make a bigger model from a small one without changing a token: zero-pad every expert's intermediate dimension.

The routing stays real and the records become as large as wanted; padding costs arithmetic and bytes like any weight.
Streams: memory stays at one tensor. Zeros are written, not left as holes: reading them must cost what it costs.

    python benchmarks/widen.py /tmp/wide --intermediate 2048
"""

import argparse
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from checkpoint import StoredTensor, read_config, stored_tensors

TINY_MOE = Path(__file__).parent.parent / "examples" / "models" / "tiny-moe"
SHARD_BYTES = 1 << 30
# Kernels tile the intermediate dimension; every one vLLM has for CPU accepts multiples of this.
MULTIPLE = 32
# Which axis of a projection's weight [out, in] is the intermediate dimension.
PADDED_AXIS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}


class WideModel(NamedTuple):
    """What was made. Sizes in bytes; a record is one expert's three projections."""

    path: Path
    intermediate: int
    experts: int
    record_bytes: int
    total_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.experts * self.record_bytes


class Tensor(NamedTuple):
    """One tensor of the source and the shape it gets."""

    stored: StoredTensor
    wide_shape: tuple[int, ...]

    @property
    def wide_bytes(self) -> int:
        """Size after padding."""
        return self.stored.bytes_of(self.wide_shape)

    def read_padded(self) -> np.ndarray:
        """The tensor's bytes as integers of its item size, zero-padded: an array of `wide_shape`."""
        padding = [(0, wide - old) for wide, old in zip(self.wide_shape, self.stored.shape, strict=True)]
        return np.ascontiguousarray(np.pad(self.stored.read(), padding))


def make_wide(path: Path | str, intermediate: int, source: Path | str = TINY_MOE) -> WideModel:
    """Write `source` with experts of `intermediate` columns to `path`; an existing model of that width is kept.

    Raises:
        ValueError: `intermediate` is smaller than the source's or no multiple of 32, or `path` holds something else.
    """
    path, source = Path(path), Path(source)
    config = read_config(source)
    least = config["moe_intermediate_size"]
    if intermediate < least or intermediate % MULTIPLE:
        raise ValueError(f"--intermediate {intermediate}: must be a multiple of {MULTIPLE}, at least {least}")
    tensors = list(_tensors(source, intermediate))
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_model(unfinished, tensors, config | {"moe_intermediate_size": intermediate}, source)
        unfinished.rename(path)
    elif _width(path) != intermediate:
        raise ValueError(
            f"{path} exists and is no model of intermediate size {intermediate}; remove it or name another"
        )
    experts = config["num_hidden_layers"] * config["num_experts"]
    expert_bytes = sum(tensor.wide_bytes for tensor in tensors if tensor.stored.is_expert)
    return WideModel(path, intermediate, experts, expert_bytes // experts, sum(t.wide_bytes for t in tensors))


def _width(path: Path) -> int | None:
    config = path / "config.json"
    return json.loads(config.read_text()).get("moe_intermediate_size") if config.exists() else None


def _tensors(source: Path, intermediate: int) -> Iterator[Tensor]:
    for stored in stored_tensors(source):
        axis = next((axis for end, axis in PADDED_AXIS.items() if stored.name.endswith(end)), None)
        wide = list(stored.shape)
        if stored.is_expert and axis is not None:
            wide[axis] = intermediate
        yield Tensor(stored, tuple(wide))


def _write_model(folder: Path, tensors: list[Tensor], config: dict[str, Any], source: Path) -> None:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.wide_bytes for t in shards[-1]) + tensor.wide_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(file, shard)
        weight_map |= {tensor.stored.name: file.name for tensor in shard}
    total = sum(tensor.wide_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for other in source.iterdir():
        if other.suffix == ".json" and not (folder / other.name).exists():
            shutil.copyfile(other, folder / other.name)
    width = config["moe_intermediate_size"]
    card = source / "README.md"
    note = f"Made by widen.py: every expert zero-padded to an intermediate size of {width}.\n"
    (folder / "README.md").write_text(f"{note}\n{card.read_text()}" if card.exists() else note)


def _write_shard(file: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.wide_bytes
        dtype, shape = tensor.stored.dtype, tensor.wide_shape
        header[tensor.stored.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            out.write(tensor.read_padded().data)
        out.flush()
        os.fsync(out.fileno())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="folder to write; an existing model of that width is kept")
    parser.add_argument("--intermediate", type=int, required=True, help="new intermediate size of every expert")
    parser.add_argument("--source", type=Path, default=TINY_MOE, help="a Qwen3-MoE checkpoint (default: tiny-moe)")
    options = parser.parse_args()
    try:
        made = make_wide(options.out, options.intermediate, options.source)
    except ValueError as error:
        parser.error(str(error))
    mib = 1 << 20
    print(
        f"{made.path}: {made.experts} records of {made.record_bytes / mib:.2f} MiB, "
        f"{made.expert_bytes / mib:.0f} MiB of experts, {made.total_bytes / mib:.0f} MiB in all"
    )


if __name__ == "__main__":
    main()
