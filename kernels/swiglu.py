"""Clamped SwiGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.activation import whole_vectors
from whalepod.kernels.jit import INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import clamped, rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

_WIDE = 512


@Kernel
def swiglu(gate_up: Tensor, limit: float, weight_M: Tensor | None = None) -> Tensor:
    """Apply `silu(min(g, limit)) * clamp(u, -limit, limit)`, times a row weight.

    Args:
        gate_up: `[M, 2I]`: the gate half, then the up half (w1 and w3 stacked).
        limit: clamp on the pre-activations; one-sided on the gate, two-sided on the up half.
        weight_M: `[M]` fp32 routing weight per row, or None (shared expert).

    Returns:
        `[M, I]` in the dtype of `gate_up`; computed in fp32.

    Source: DeepSeek-V4 inference/model.py, Expert (the clamp also holds for the shared expert).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = F.silu(whole_vectors(gate.clamp(max=limit)))[: gate.shape[0]]
    out = gate * up.clamp(-limit, limit)
    if weight_M is not None:
        out = out * weight_M.unsqueeze(-1)
    return out.to(gate_up.dtype)


@jit
def _kernel(
    x, weights, out, WIDTH, LIMIT: tl.constexpr, CUTS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    at = x + m * 2 * WIDTH + i
    gate = tl.load(at, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=i < WIDTH, other=0.0).to(tl.float32)
    gate, up = clamped(gate, float("-inf"), LIMIT), clamped(up, -LIMIT, LIMIT)
    small = tl.exp(-tl.abs(gate))  # of the sigmoid: never infinite
    made = gate * (tl.where(gate < 0, small, 1.0) / (1.0 + small)) * up
    if weights is not None:
        made *= tl.load(weights + m)
    tl.store(out + m * WIDTH + i, rounded(made, out.dtype.element_ty, CUTS), mask=i < WIDTH)


@swiglu.twin("triton", runs)
def _swiglu(gate_up: Tensor, limit: float, weight_M: Tensor | None = None) -> Tensor:
    x, (rows, width) = gate_up.contiguous(), gate_up.shape
    out = x.new_empty(rows, width // 2)
    if out.numel():
        _kernel[(rows, triton.cdiv(width // 2, _WIDE))](
            x, weight_M, out, width // 2, LIMIT=limit, CUTS=INTERPRETED, WIDE=_WIDE, num_warps=4,
            **early(),
        )  # fmt: skip
    return out
