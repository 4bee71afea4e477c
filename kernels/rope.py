"""Rotate the last dims of vectors by their positions: adjacent pairs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, tl


def rotate_(x: Tensor, turns_TP: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last `rd` dims of `x` in place; returns `x`.

    Args:
        x: `[T, D]` or `[T, heads, D]`, fp32 or bf16.
        turns_TP: `[T, rd/2]` from `turns`.
        inverse: rotate by the negative angle (attention output).
    """
    pairs = turns_TP.shape[-1]
    if x.ndim == 3:
        turns_TP = turns_TP.unsqueeze(1)
    if inverse:
        turns_TP = turns_TP.conj()
    tail = x[..., x.shape[-1] - 2 * pairs :]
    if x.dtype == torch.float32:
        torch.view_as_complex(tail.unflatten(-1, (pairs, 2))).mul_(turns_TP)
    else:
        wide = torch.view_as_complex(tail.float().unflatten(-1, (pairs, 2))) * turns_TP
        tail.copy_(torch.view_as_real(wide).flatten(-2))
    return x


@jit
def turned(
    value, turns, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rotate the last 2 * PAIRS of D columns of rows `[ROWS, WIDTH]` fp32 alike.

    Args:
        turns: one position's cosines and sines, side by side, fp32.
    """
    a, b = tl.split(tl.reshape(value, (ROWS, WIDTH // 2, 2)))
    pair = tl.arange(0, WIDTH // 2) - (D // 2 - PAIRS)
    inside = (pair >= 0) & (pair < PAIRS)
    cos = tl.load(turns + 2 * pair, mask=inside, other=1.0)[None, :]
    sin = tl.load(turns + 2 * pair + 1, mask=inside, other=0.0)[None, :]
    both = tl.join(tl.fma(a, cos, -(b * sin)), tl.fma(a, sin, b * cos))
    return tl.reshape(both, (ROWS, WIDTH))
