"""Number formats of the released checkpoints, and the activation roundings that go with them.

Scales are powers of two stored as E8M0 bytes: value `2 ** (byte - 127)`, 255 is NaN.
Legend: N outputs, K inputs of a matrix. Source: DeepSeek-V4 inference/kernel.py, convert.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.quantise import (
    FP4_GROUP,
    FP4_MAX,
    FP4_VALUES,
    FP8_MAX,
    fake_fp4,
    fake_fp8,
    fp4_codes,
    power_of_two_above,
)

__all__ = [
    "FP4_GROUP",
    "FP4_MAX",
    "FP8_BLOCK",
    "FP8_MAX",
    "decode_e8m0",
    "decode_fp4",
    "decode_fp8",
    "encode_e8m0",
    "encode_fp4",
    "encode_fp8",
    "fake_fp4",
    "fake_fp8",
    "how_many_spoilt",
    "power_of_two_above",
]

FP8_BLOCK = 128


def decode_e8m0(scale: Tensor) -> Tensor:
    """E8M0 bytes (or fp32 scales, as some -Base files may hold) to fp32.

    Raises:
        ValueError: a byte is 255, the format's NaN.
    """
    if scale.dtype == torch.float32:
        return scale
    codes = scale.view(torch.uint8)
    if bool((codes == 255).any()):
        raise ValueError("an E8M0 scale is NaN (byte 255)")
    bits = codes.to(torch.int32) << 23
    value: Tensor = bits.masked_fill(codes == 0, 1 << 22).view(torch.float32)  # 0 is subnormal
    return value


def how_many_spoilt(values: Tensor) -> int:
    """How many values of a stored tensor are NaN or infinite; integers and E8M0 scales are taken as sound.

    A pass over the extremes at the memory's rate says that there are none.
    """
    if not values.numel():
        return 0
    if values.dtype == torch.float8_e4m3fn:  # 0x7F and 0xFF are NaN, and there is no infinity
        if values.view(torch.int8).amax() < 127 and values.view(torch.uint8).amax() < 255:
            return 0
        return int(((values.view(torch.uint8) & 0x7F) == 0x7F).sum())
    if values.dtype not in (torch.float32, torch.bfloat16):
        return 0
    if all(bool(end.isfinite()) for end in torch.aminmax(values)):
        return 0
    return int((~values.isfinite()).sum())


def decode_fp8(weight_NK: Tensor, scale: Tensor) -> Tensor:
    """E4M3 with one scale per 128x128 tile to fp32, `[N, K]`; the last tiles may be cut off."""
    rows, cols = weight_NK.shape
    grid = decode_e8m0(scale)
    grid = grid.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :cols]
    return weight_NK.float() * grid


def decode_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed E2M1 `[N, K/2]` int8 with scales `[N, K/32]` to fp32, `[N, K]`.

    The low nibble is the even column.
    """
    codes = packed.view(torch.uint8)
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=packed.device)
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    groups = values[both].unflatten(1, (-1, FP4_GROUP))
    value: Tensor = (groups * decode_e8m0(scale).unsqueeze(-1)).flatten(1)
    return value


def encode_e8m0(scale: Tensor) -> Tensor:
    """Powers of two in fp32 to E8M0."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def encode_fp8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to E4M3 with one power-of-two scale per 128x128 tile."""
    rows, cols = weight_NK.shape
    pad = (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    tiles = F.pad(weight_NK.float(), pad)
    tiles = tiles.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp_min(1e-30)
    scale = power_of_two_above(amax / FP8_MAX)
    codes = (tiles / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:rows, :cols].contiguous()
    return codes.view(torch.float8_e4m3fn), encode_e8m0(scale[:, 0, :, 0])


def encode_fp4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to packed E2M1 with one power-of-two scale per row and 32 columns."""
    groups = weight_NK.float().unflatten(1, (-1, FP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scale = power_of_two_above(amax / FP4_MAX)
    scaled = (groups / scale).clamp(-FP4_MAX, FP4_MAX)
    codes = (fp4_codes(scaled) + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), encode_e8m0(scale.squeeze(-1))
