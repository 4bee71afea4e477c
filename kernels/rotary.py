"""Root-mean-square norm and rotary positions of heads, in one operation.

Legend: T rows, H heads, D head_dim, P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import FIXED, INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import normed, rms_norm
from whalepod.kernels.rope import rotate_, turned

_HEADS = 8


@Kernel
def norm_rotate(x_THD: Tensor, weight_D: Tensor | None, turns_TP: Tensor, eps: float) -> Tensor:
    """Normalise every head, then rotate its last dims.

    Args:
        x_THD: `[T, H, D]`, fp32 or bf16; may be part of a wider tensor.
        weight_D: of the norm, or None for the unweighted one.
        turns_TP: `[T, P]` complex64.
        eps: added to the mean square; below 0 there is no norm.

    Returns:
        `[T, H, D]` in the dtype of `x_THD`.
    """
    x = x_THD.clone() if eps < 0 else rms_norm.reference(x_THD, weight_D, eps)
    return rotate_(x, turns_TP)


@jit
def _kernel(
    x, weight, turns, out, H, stride_t, stride_h, EPS: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr, CUTS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    kept = (h < H)[:, None] & (d < D)[None, :]
    at = x + t * stride_t + h[:, None] * stride_h + d[None, :]
    value = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if EPS >= 0:
        value = normed(value, D, EPS)
        if weight is not None:
            value = value * tl.load(weight + d, mask=d < D, other=0.0)[None, :]
        value = rounded(value, kind, CUTS).to(tl.float32)
    value = turned(value, turns + t * (2 * PAIRS), D, PAIRS, HEADS, WIDTH)
    tl.store(out + (t * H + h[:, None]) * D + d[None, :], rounded(value, kind, CUTS), mask=kept)


@norm_rotate.twin("triton", runs)
def _norm_rotate(x_THD: Tensor, weight_D: Tensor | None, turns_TP: Tensor, eps: float) -> Tensor:
    tokens, heads, size = x_THD.shape
    x = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turns = torch.view_as_real(turns_TP).contiguous()
    if tokens:
        _kernel[(tokens, triton.cdiv(heads, _HEADS))](
            x, weight_D, turns, out, heads, x.stride(0), x.stride(1), EPS=eps, D=size,
            PAIRS=turns.shape[1], CUTS=INTERPRETED, HEADS=_HEADS,
            WIDTH=triton.next_power_of_2(size), num_warps=4, **FIXED, **early(),
        )  # fmt: skip
    return out
