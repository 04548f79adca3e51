"""Quantization of one weight matrix into the tensors a checkpoint stores; plain rounding, no calibration.

Every function takes `weight [outputs, inputs]` in float32 and returns the stored tensors by the last part of their
name.
"""

import torch

FP8_BLOCK = 128
GROUP = 64
MXFP4_BLOCK = 32
MXFP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Stored = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).to(torch.float8_e4m3fn)


def fp8_per_tensor(weight: torch.Tensor) -> Stored:
    scale = weight.abs().max() / 448.0
    return {"weight": fp8(weight, scale), "weight_scale": scale}


def fp8_per_block(weight: torch.Tensor) -> Stored:
    outputs, inputs = weight.shape
    blocks = weight.reshape(outputs // FP8_BLOCK, FP8_BLOCK, inputs // FP8_BLOCK, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448.0
    return {"weight": fp8(blocks, scale).reshape(outputs, inputs), "weight_scale_inv": scale[:, 0, :, 0].contiguous()}


def symmetric(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-2^(bits-1), 2^(bits-1)) as int8 `[outputs, inputs]`, bf16 scales `[outputs, inputs / group]`."""
    groups = weight.unflatten(1, (-1, group))
    limit = 2 ** (bits - 1)
    scale = (groups.abs().amax(dim=2, keepdim=True) / (limit - 1)).to(torch.bfloat16)
    codes = (groups / scale).round().clamp(-limit, limit - 1).to(torch.int8)
    return codes.flatten(1), scale.squeeze(2)


def asymmetric(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes in [0, 16), float16 scales and zero points in [0, 16), the last two `[outputs, inputs / group]`."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(dim=2, keepdim=True).clamp(max=0), groups.amax(dim=2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).to(torch.float16)
    zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale + zero).round().clamp(0, 15)
    return codes.to(torch.int32).flatten(1), scale.squeeze(2), zero.squeeze(2).to(torch.int32)


def pack(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Put 32 / bits unsigned codes of the last dimension into each int32, the first in the lowest bits."""
    lanes = codes.to(torch.int64).unflatten(-1, (-1, 32 // bits))
    if order is not None:
        lanes = lanes[..., order]
    words = (lanes << torch.arange(0, 32, bits)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int8_per_channel(weight: torch.Tensor) -> Stored:
    codes, scale = symmetric(weight, bits=8, group=weight.shape[1])
    return {"weight": codes, "weight_scale": scale.float()}


def int4_unpacked(weight: torch.Tensor) -> Stored:
    codes, scale = symmetric(weight, bits=4, group=GROUP)
    return {"weight": codes, "weight_scale": scale}


def packed_integers(weight: torch.Tensor, bits: int) -> Stored:
    codes, scale = symmetric(weight, bits, GROUP)
    return {
        "weight_packed": pack(codes.to(torch.int32) + 2 ** (bits - 1), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def awq(weight: torch.Tensor) -> Stored:
    codes, scale, zero = asymmetric(weight, GROUP)
    return {
        "qweight": pack(codes.T, 4, AWQ_ORDER),
        "scales": scale.T.contiguous(),
        "qzeros": pack(zero.T, 4, AWQ_ORDER),
    }


def gptq(weight: torch.Tensor) -> Stored:
    """The format stores a zero point minus one; the zero point of a symmetric code is 8."""
    codes, scale = symmetric(weight, 4, GROUP)
    groups = weight.shape[1] // GROUP
    return {
        "qweight": pack(codes.to(torch.int32) + 8, 4).T.contiguous(),
        "scales": scale.T.to(torch.float16).contiguous(),
        "qzeros": pack(torch.full((groups, weight.shape[0]), 7), 4),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 32 inputs share a power of two. Returns two E2M1 codes a byte, `[..., inputs / 32, 16]` uint8, and
    the exponents plus 127, `[..., inputs / 32]` uint8."""
    blocks = weight.unflatten(-1, (-1, MXFP4_BLOCK))
    exponent = blocks.abs().amax(dim=-1, keepdim=True).log2().floor() - 2
    scaled = blocks / exponent.exp2()
    magnitude = (scaled.abs().unsqueeze(-1) - MXFP4_VALUES).abs().argmin(dim=-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent.squeeze(-1) + 127).to(torch.uint8)
