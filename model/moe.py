"""Routed experts in one process: the reference for every way of spreading them.

Legend: T tokens, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.kernels.linear import ROW_STEP
from whalepod.kernels.swiglu import swiglu
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
    groups: dict[int, list[int]] = {}
    for row, expert in enumerate(experts):
        groups.setdefault(expert, []).append(row)
    # Rows of an expert lie side by side, filled up to whole steps with copies of the first, so
    # that no product needs padding of its own; the activation runs over all experts at once.
    order: list[int] = []
    place = [0] * len(experts)
    spans: list[tuple[Expert, int, int]] = []
    for expert, rows in groups.items():
        start = len(order)
        for offset, row in enumerate(rows):
            place[row] = start + offset
        order += rows + rows[:1] * (-len(rows) % ROW_STEP)
        spans.append((table[expert], start, len(order)))
    at = torch.tensor(order, device=x_ND.device)
    fidelity, limit = spans[0][0].fidelity, spans[0][0].limit
    x = fidelity.linear_input(x_ND[at])
    gate_up = x.new_empty(len(order), spans[0][0].w13.shape[0])
    for one, a, b in spans:
        torch.mm(x[a:b], one.w13_t, out=gate_up[a:b])
    inner = fidelity.linear_input(swiglu(gate_up, limit, weights_N[at]))
    out = torch.empty_like(x)
    for one, a, b in spans:
        torch.mm(inner[a:b], one.w2_t, out=out[a:b])
    return out[torch.tensor(place, device=x_ND.device)]


def mixture(x_TD: Tensor, routes: Routes, table: Mapping[int, Expert]) -> Tensor:
    """Run every token through its experts and add up, `[T, D]` fp32."""
    tokens, k = routes.experts_TK.shape
    flat = x_TD.repeat_interleave(k, dim=0)
    parts = run_experts(
        flat, routes.experts_TK.flatten().tolist(), routes.weights_TK.flatten(), table
    )
    return combine(parts.view(tokens, k, -1))
