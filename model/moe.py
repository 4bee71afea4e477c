"""Routed experts in one process: the reference for every way of spreading them.

Legend: T tokens, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.kernels.experts import run_pairs
from whalepod.model.expert import Expert
from whalepod.model.gate import Routes
from whalepod.model.stack import ExpertStack

# The experts of a layer that are here.
Table = Mapping[int, Expert] | ExpertStack


def run_experts(x_ND: Tensor, experts: list[int], weights_N: Tensor, table: Table) -> Tensor:
    """Run row n through expert `experts[n]` with weight `weights_N[n]`.

    Rows of one expert go through it together; the result does not depend on that.

    Returns:
        `[N, D]` in the dtype of `x_ND`, row n for row n.
    """
    at = torch.tensor(experts, device=x_ND.device)
    if isinstance(table, ExpertStack):
        return table(x_ND, at.unsqueeze(1), weights_N.unsqueeze(1)).squeeze(1)
    return _pairs(x_ND, at, weights_N, 1, table)


def run_held(x_MD: Tensor, experts_MK: Tensor, weights_MK: Tensor, table: Table) -> Tensor:
    """Run every choice whose expert is in `table`, `[M, K, D]`; the others (-1) are left at zero.

    Args:
        experts_MK: int32 or int64. weights_MK: fp32.
    """
    if isinstance(table, ExpertStack):
        return table(x_MD, experts_MK, weights_MK)
    out = x_MD.new_zeros(*experts_MK.shape, x_MD.shape[1])
    at, choice = (experts_MK >= 0).nonzero(as_tuple=True)
    if len(at):
        here = experts_MK[at, choice].long(), weights_MK[at, choice]
        out[at, choice] = _pairs(x_MD[at], *here, 1, table)
    return out


def _pairs(
    x_MD: Tensor, experts_N: Tensor, weights_N: Tensor, share: int, table: Mapping[int, Expert]
) -> Tensor:
    one = next(iter(table.values()))
    rounding = one.fidelity.linear_input if one.fidelity.released else None
    return run_pairs(x_MD, experts_N, weights_N, share, table, one.limit, rounding)


def mixture(x_TD: Tensor, routes: Routes, table: Table) -> Tensor:
    """Run every token through its experts and add up, `[T, D]` fp32.

    A stack's outputs are left as they are, `[T, K, D]`: whoever closes the layer adds them up (`hc_post`).
    """
    if isinstance(table, ExpertStack):
        return table(x_TD, routes.experts_TK, routes.weights_TK)
    tokens, k = routes.experts_TK.shape
    parts = _pairs(x_TD, routes.experts_TK.flatten(), routes.weights_TK.flatten(), k, table)
    return combine(parts.view(tokens, k, -1))
