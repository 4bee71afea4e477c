"""Sinkhorn normalisation of the hyper-connection mixing matrices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from whalepod.kernels.linear import padded_rows
from whalepod.kernels.registry import Kernel


@cache
def _sum_matrices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices that replace every element of a flat `C x C` matrix by its row's, its column's sum."""
    eye, ones = torch.eye(size, device=device), torch.ones(size, size, device=device)
    return torch.kron(eye, ones), torch.kron(ones, eye)


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
    size = logits.shape[-1]
    rows, columns = _sum_matrices(size, logits.device)
    flat, count = padded_rows(torch.softmax(logits, dim=-1).view(-1, size * size))
    mix, offset = flat + eps, flat.new_full((size * size,), eps)
    # One product gives the sums, spread over the elements they divide, eps included.
    mix.div_(torch.addmm(offset, mix, columns))
    for _ in range(iters - 1):
        mix.div_(torch.addmm(offset, mix, rows))
        mix.div_(torch.addmm(offset, mix, columns))
    return mix[:count].view(logits.shape)
