"""Routed experts in one process: the reference for every way of spreading them.

Legend: T tokens, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.model.expert import Expert
from whalepod.model.gate import Routes


def run_experts(
    x_ND: Tensor, experts: list[int], weights_N: Tensor, table: Mapping[int, Expert]
) -> Tensor:
    """Run row n through expert `experts[n]` with weight `weights_N[n]`.

    Rows of one expert go through it together; the result does not depend on that.

    Returns:
        `[N, D]` in the dtype of `x_ND`, row n for row n.
    """
    out = torch.empty_like(x_ND)
    groups: dict[int, list[int]] = {}
    for row, expert in enumerate(experts):
        groups.setdefault(expert, []).append(row)
    for expert, rows in groups.items():
        at = torch.tensor(rows, device=x_ND.device)
        out[at] = table[expert](x_ND[at], weights_N[at])
    return out


def mixture(x_TD: Tensor, routes: Routes, table: Mapping[int, Expert]) -> Tensor:
    """Run every token through its experts and add up, `[T, D]` fp32."""
    tokens, k = routes.experts_TK.shape
    flat = x_TD.repeat_interleave(k, dim=0)
    parts = run_experts(
        flat, routes.experts_TK.flatten().tolist(), routes.weights_TK.flatten(), table
    )
    return combine(parts.view(tokens, k, -1))
