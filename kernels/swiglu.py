"""Clamped SwiGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.activation import whole_vectors
from whalepod.kernels.registry import Kernel


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
