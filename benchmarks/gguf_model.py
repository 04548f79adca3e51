"""Write a Qwen3-MoE checkpoint as GGUF, what llama.cpp reads. Needs `pip install gguf` (and numpy), no torch.

The experts of a layer become one tensor per projection; norms and routers become F32, as in llama.cpp's own converter.
There is no vocabulary: whoever uses the file feeds token numbers. Streams: memory stays at one such tensor.

    python benchmarks/gguf_model.py /tmp/wide /tmp/wide.bf16.gguf --type bf16
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from checkpoint import StoredTensor, read_config, stored_tensors

ARCHITECTURE = gguf.MODEL_ARCH.QWEN3MOE
TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}


class OutTensor(NamedTuple):
    """One tensor of the GGUF file: `parts` are stacked along a new first axis if there are several."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    parts: Sequence[StoredTensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * (4 if self.kind == gguf.GGMLQuantizationType.F32 else 2)

    def read(self) -> np.ndarray:
        """Its values as the file stores them; bfloat16 as 16-bit integers. Raises ValueError where they do not fit."""
        array = np.empty(self.shape, np.float32 if self.kind == gguf.GGMLQuantizationType.F32 else np.uint16)
        rows = array if len(self.parts) > 1 else array[None]
        for row, part in zip(rows, self.parts, strict=True):
            row[...] = _converted(part, self.kind)
        return array


def write_gguf(out: Path, checkpoint: Path, type_name: str) -> None:
    """Write `checkpoint` to `out`, matrices as `type_name`; an existing file is kept.

    Raises:
        ValueError: it is no Qwen3-MoE checkpoint in bfloat16, or has values that float16 cannot hold.
    """
    if out.exists():
        return
    config = read_config(checkpoint)
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"{checkpoint}: model_type {config['model_type']!r}; only qwen3_moe can be written as GGUF")
    tensors = list(_out_tensors(list(stored_tensors(checkpoint)), config, TYPES[type_name]))
    unfinished = out.with_name(f"{out.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    _describe(writer, config, FILE_TYPES[type_name])
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("u2"), tensor.size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
    writer.close()
    unfinished.rename(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: gguf.LlamaFileType) -> None:
    known: list[tuple[Callable[[Any], None], str]] = [
        (writer.add_block_count, "num_hidden_layers"),
        (writer.add_context_length, "max_position_embeddings"),
        (writer.add_embedding_length, "hidden_size"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_key_length, "head_dim"),
        (writer.add_value_length, "head_dim"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
        (writer.add_expert_count, "num_experts"),
        (writer.add_expert_used_count, "num_experts_per_tok"),
        (writer.add_expert_feed_forward_length, "moe_intermediate_size"),
        (writer.add_vocab_size, "vocab_size"),
    ]
    for add, key in known:
        add(config[key])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("none")


def _out_tensors(
    stored: Sequence[StoredTensor], config: dict[str, Any], kind: gguf.GGMLQuantizationType
) -> Iterator[OutTensor]:
    """Every tensor of the file, experts of a projection together and in the order of their numbers."""
    names = gguf.get_tensor_name_map(ARCHITECTURE, config["num_hidden_layers"])
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in sorted(stored, key=_expert_number):
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", tensor.name), []).append(tensor)
    for source, parts in groups.items():
        name = names.get_name(source, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{source}: GGUF has no name for it")
        if parts[0].dtype != "BF16":
            raise ValueError(f"{source} is {parts[0].dtype}; only BF16 checkpoints can be written as GGUF")
        shape = parts[0].shape if not parts[0].is_expert else (len(parts), *parts[0].shape)
        is_small = len(shape) == 1 or ".ffn_gate_inp." in name
        yield OutTensor(name, shape, gguf.GGMLQuantizationType.F32 if is_small else kind, parts)


def _expert_number(tensor: StoredTensor) -> int:
    match = re.search(r"\.experts\.(\d+)\.", tensor.name)
    return int(match[1]) if match else -1


def _converted(tensor: StoredTensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    bfloat16 = tensor.read()
    if kind == gguf.GGMLQuantizationType.BF16:
        return bfloat16
    values = (bfloat16.astype(np.uint32) << 16).view(np.float32)
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    largest = np.finfo(np.float16).max
    if not (np.abs(values) <= largest).all():
        raise ValueError(f"{tensor.name} has values beyond {largest}: write it as bf16")
    return values.astype(np.float16).view(np.uint16)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", type=Path, help="a Qwen3-MoE checkpoint in bfloat16")
    parser.add_argument("out", type=Path, help="GGUF file to write; an existing one is kept")
    parser.add_argument("--type", choices=list(TYPES), default="bf16", help="of matrices")
    options = parser.parse_args()
    try:
        write_gguf(options.out, options.checkpoint, options.type)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
