"""Sum what the experts sent back, in an order that no layout changes."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

_WIDE = 512


@Kernel
def combine(parts_TKD: Tensor) -> Tensor:
    """Add each token's expert outputs one after the other.

    Args:
        parts_TKD: `[T, K, D]`, the k-th choice's output at index k, already weighted.

    Returns:
        `[T, D]` fp32. The order of the sum is the order of the router's choices, so every
        placement of experts on shards gives the same bits.
    """
    total = parts_TKD[:, 0].float()
    for k in range(1, parts_TKD.shape[1]):
        total = total + parts_TKD[:, k]
    return total


@jit
def _kernel(parts, out, D, K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False):
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.load(parts + t * K * D + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(1, K):
        total += tl.load(parts + (t * K + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, total, mask=d < D)


@combine.twin("triton", runs)
def _combine(parts_TKD: Tensor) -> Tensor:
    tokens, k, width = parts_TKD.shape
    parts = parts_TKD.contiguous()
    out = parts.new_empty(tokens, width, dtype=torch.float32)
    if out.numel():
        _kernel[(tokens, triton.cdiv(width, _WIDE))](
            parts, out, width, K=k, WIDE=_WIDE, num_warps=2, **early()
        )
    return out
