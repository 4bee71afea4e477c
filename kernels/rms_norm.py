"""Root-mean-square normalisation, weighted and unweighted."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.jit import FIXED, INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

# Elements of a program's tile, when rows are short.
_TILE = 4096


@Kernel
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square of the last dim, in fp32, then multiply by `weight`.

    Args:
        x: `[..., D]`, fp32 or bf16.
        weight: `[D]` fp32, or None for the unweighted norm of the query heads.
        eps: added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`; the only rounding to it comes after the weight.

    Source: DeepSeek-V4 inference/model.py, RMSNorm.
    """
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


@jit
def normed(value, size, eps):
    """Divide rows `[R, D]` fp32 by their root mean square over `size` (what lies behind is zero)."""
    return value * (1.0 / tl.sqrt(tl.sum(value * value, 1) / size + eps))[:, None]


@jit
def _kernel(
    x, weight, out, M, stride, EPS: tl.constexpr, D: tl.constexpr, CUTS: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    d = tl.arange(0, WIDTH)
    if WEIGHTED:  # weights do not wait
        factor = tl.load(weight + d, mask=d < D, other=0.0)[None, :]
    begin(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    kept = (row < M)[:, None] & (d < D)[None, :]
    value = tl.load(x + row[:, None] * stride + d[None, :], mask=kept, other=0.0).to(tl.float32)
    value = normed(value, D, EPS)
    if WEIGHTED:
        value = value * factor
    tl.store(
        out + row[:, None] * D + d[None, :], rounded(value, out.dtype.element_ty, CUTS), mask=kept
    )


@rms_norm.twin("triton", runs)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(size)
    rows = max(1, min(8, _TILE // width))
    if len(flat):
        _kernel[(triton.cdiv(len(flat), rows),)](
            flat, weight, out, len(flat), flat.stride(0), EPS=eps, D=size, CUTS=INTERPRETED,
            WEIGHTED=weight is not None, ROWS=rows, WIDTH=width,
            num_warps=8 if width > _TILE else 4, **FIXED, **early(),
        )  # fmt: skip
    return out.view(x.shape)
