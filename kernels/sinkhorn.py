"""Sinkhorn normalisation of the hyper-connection mixing matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.registry import Kernel


def _sums(x: Tensor, dim: int) -> Tensor:
    """Sum along a short dim, kept, one after the other: the same order for any number of matrices."""
    parts: tuple[Tensor, ...] = x.split(1, dim)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@Kernel
def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Make each matrix nearly doubly stochastic.

    Row softmax + eps, then columns; then `iters - 1` times rows, then columns: `iters` column
    normalisations in all, the last step on columns. eps is added to the softmax and to every sum.

    Args:
        logits: `[..., C, C]` fp32; the last index runs along a row.
        iters: at least 1.
        eps: `hc_eps` of the model.

    Returns:
        `[..., C, C]` fp32.

    Source: DeepSeek-V4 inference/kernel.py, hc_split_sinkhorn.
    """
    mix = torch.softmax(logits, dim=-1) + eps
    mix.div_(_sums(mix, -2) + eps)
    for _ in range(iters - 1):
        mix.div_(_sums(mix, -1) + eps)
        mix.div_(_sums(mix, -2) + eps)
    return mix
