"""Queries: normalise each head, then rotate it.

Legend: T tokens, H heads, D head_dim, P rotated pairs.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import FIXED, INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import rounded
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import normed, rms_norm
from whalepod.kernels.rope import rotate_, turned

_HEADS = 8


@Kernel
def query_heads(q_THD: Tensor, turns_TP: Tensor, eps: float) -> Tensor:
    """Unweighted RMS norm over each head, then rotary positions on its last 2 P dims.

    Args:
        q_THD: `[T, H, D]` bf16 or fp32, last dim contiguous.
        turns_TP: `[T, P]` complex64, unit.
        eps: of the norm.

    Returns:
        `[T, H, D]` in the dtype of `q_THD`, rounded to it after either step.
    """
    return rotate_(rms_norm.reference(q_THD, None, eps), turns_TP)


@jit
def _kernel(
    q, turns, out, H, stride_t, stride_h, EPS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    CUTS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    kept = (h < H)[:, None] & (d < D)[None, :]
    at = q + t * stride_t + h[:, None] * stride_h + d[None, :]
    value = normed(tl.load(at, mask=kept, other=0.0).to(tl.float32), D, EPS)
    kind = out.dtype.element_ty
    value = rounded(value, kind, CUTS).to(tl.float32)
    value = turned(value, turns + t * (2 * PAIRS), D, PAIRS, HEADS, WIDTH)
    tl.store(out + (t * H + h[:, None]) * D + d[None, :], rounded(value, kind, CUTS), mask=kept)


@query_heads.twin("triton", runs)
def _query_heads(q_THD: Tensor, turns_TP: Tensor, eps: float) -> Tensor:
    tokens, heads, size = q_THD.shape
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    turns = torch.view_as_real(turns_TP).contiguous()
    if tokens:
        _kernel[(tokens, triton.cdiv(heads, _HEADS))](
            q_THD, turns, out, heads, q_THD.stride(0), q_THD.stride(1), EPS=eps, D=size,
            PAIRS=turns.shape[1], CUTS=INTERPRETED, HEADS=_HEADS,
            WIDTH=triton.next_power_of_2(size), num_warps=4, **FIXED,
        )  # fmt: skip
    return out
