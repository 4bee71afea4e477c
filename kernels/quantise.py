"""Round activations to narrow formats, with power-of-two scales formed as the released models do.

Source: DeepSeek-V4 inference/kernel.py (act_quant, fp4_act_quant).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
FP4_GROUP = 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def power_of_two_above(x: Tensor) -> Tensor:
    """Smallest power of two that is at least `x` (> 0), fp32, from the bits: exact powers stay."""
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    found: Tensor = (exponent << 23).view(torch.float32)
    return found


def fp4_codes(scaled: Tensor) -> Tensor:
    """Nearest E2M1 magnitude codes of `|x| <= 6`, ties to the even code."""
    magnitude = scaled.abs()
    midpoints = torch.tensor(_FP4_MIDPOINTS, device=scaled.device)
    codes = torch.bucketize(magnitude, midpoints)  # a tie lands on the lower code ...
    tie = magnitude == midpoints[codes.clamp(max=6)]
    return codes + (tie & (codes % 2 == 1)).long()  # ... and moves up when that one is odd


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
    values = torch.tensor(FP4_VALUES, device=x.device)[fp4_codes(scaled)]
    return (torch.copysign(values, scaled) * scale).flatten(-2).to(x.dtype)
