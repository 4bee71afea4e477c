"""Triton twin of `best_tokens`: a row's norm has the bits that `sample_triton` subtracts, whatever its company."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels import sample_triton
from whalepod.kernels.jit import jit, tl, triton
from whalepod.kernels.sample_triton import best_of, scan_kernel


@jit
def _norm_kernel(
    best, where, sums, places, norms, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr
):
    """Grid (N)."""
    n = tl.program_id(0).to(tl.int64)
    token, top, norm = best_of(best, where, sums, n, V, S, SP)
    tl.store(places + n, tl.minimum(token, V - 1).to(tl.int64))
    tl.store(norms + n, top + tl.log(norm))


def best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `kernels.draw.best_tokens`."""
    (count, size), device = logits_NV.shape, logits_NV.device
    places, norms = torch.empty(count, dtype=torch.int64, device=device), logits_NV.new_empty(count)
    if not count:
        return places, norms
    slices = triton.cdiv(size, sample_triton.SLICE)
    best, sums = logits_NV.new_empty(2, count, slices)
    where = torch.empty(count, slices, dtype=torch.int32, device=device)
    scan_kernel[count, slices](
        logits_NV.contiguous(), best, where, sums, size, slices, sample_triton.SLICE
    )
    _norm_kernel[(count,)](
        best, where, sums, places, norms, size, slices, max(2, triton.next_power_of_2(slices)),
        num_warps=1,
    )  # fmt: skip
    return places, norms
