"""Number formats of the released checkpoints, and the activation roundings that go with them.

Scales are powers of two stored as E8M0 bytes: value `2 ** (byte - 127)`, 255 is NaN.
Legend: N outputs, K inputs of a matrix. Source: DeepSeek-V4 inference/kernel.py, convert.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
FP8_BLOCK, FP4_GROUP = 128, 32
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


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
    values = torch.tensor([*_FP4_VALUES, *(-v for v in _FP4_VALUES)], device=packed.device)
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    groups = values[both].unflatten(1, (-1, FP4_GROUP))
    value: Tensor = (groups * decode_e8m0(scale).unsqueeze(-1)).flatten(1)
    return value


def power_of_two_above(x: Tensor) -> Tensor:
    """Smallest power of two that is at least `x` (> 0), fp32, from the bits: exact powers stay."""
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    found: Tensor = (exponent << 23).view(torch.float32)
    return found


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


def _fp4_codes(scaled: Tensor) -> Tensor:
    """Nearest E2M1 magnitude codes of `|x| <= 6`, ties to the even code."""
    magnitude = scaled.abs()
    midpoints = torch.tensor(_FP4_MIDPOINTS, device=scaled.device)
    codes = torch.bucketize(magnitude, midpoints)  # a tie lands on the lower code ...
    tie = magnitude == midpoints[codes.clamp(max=6)]
    return codes + (tie & (codes % 2 == 1)).long()  # ... and moves up when that one is odd


def encode_fp4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to packed E2M1 with one power-of-two scale per row and 32 columns."""
    groups = weight_NK.float().unflatten(1, (-1, FP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scale = power_of_two_above(amax / FP4_MAX)
    scaled = (groups / scale).clamp(-FP4_MAX, FP4_MAX)
    codes = (_fp4_codes(scaled) + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), encode_e8m0(scale.squeeze(-1))


def fake_fp8(x: Tensor, block: int) -> Tensor:
    """Round activations to E4M3 in blocks of the last dim and back; the dtype is kept.

    Scale: `2 ** ceil(log2(max(amax, 1e-4) / 448))`, formed as `amax * fp32(1/448)`.
    A last dim that is no multiple of `block` has one shorter block at its end.
    """
    size = x.shape[-1]
    groups = F.pad(x.float(), (0, -size % block)).unflatten(-1, (-1, block))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = power_of_two_above(amax * (1.0 / FP8_MAX))
    codes = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    rounded: Tensor = (codes.float() * scale).flatten(-2)[..., :size].to(x.dtype)
    return rounded


def fake_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round activations to E2M1 in blocks of the last dim and back; the dtype is kept."""
    groups = x.float().unflatten(-1, (-1, block))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(FP4_MAX * 2.0**-126)
    scale = power_of_two_above(amax * (1.0 / FP4_MAX))
    scaled = (groups / scale).clamp(-FP4_MAX, FP4_MAX)
    values = torch.tensor(_FP4_VALUES, device=x.device)[_fp4_codes(scaled)]
    return (torch.copysign(values, scaled) * scale).flatten(-2).to(x.dtype)
