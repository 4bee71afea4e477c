"""Routed experts: every row through its expert's clamped SwiGLU.

Legend: M rows, N (row, expert) pairs, K pairs of a row, D width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from whalepod.kernels.linear import ROW_STEP, product_in_steps
from whalepod.kernels.registry import Kernel
from whalepod.kernels.swiglu import swiglu


class Matrices(Protocol):
    """An expert's gate and up projection `[2I, D]`, one above the other, and its down one `[D, I]`.

    `kept` is what a twin remembers of them.
    """

    w13: Tensor
    w2: Tensor
    kept: object


@Kernel
def run_pairs(
    x_MD: Tensor,
    experts_N: Tensor,
    weights_N: Tensor,
    share: int,
    table: Mapping[int, Matrices],
    limit: float,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run pair n, which is row `n // share` and expert `experts_N[n]`, with weight `weights_N[n]`.

    Args:
        x_MD: `[M, D]`. experts_N: int64, `M * share` keys of `table`; at least one.
        weights_N: fp32, applied before the down projection.
        limit: clamp on the pre-activations.
        rounding: applied to the inputs of both products.

    Returns:
        `[N, D]`, pair n for pair n; which pairs share an expert does not change any.
    """
    experts = experts_N.tolist()
    groups: dict[int, list[int]] = {}
    for pair, expert in enumerate(experts):
        groups.setdefault(expert, []).append(pair)
    # Rows of an expert lie side by side, filled up to whole steps with copies of the first, so
    # that no product needs padding of its own; the activation runs over all experts at once.
    order: list[int] = []
    place = [0] * len(experts)
    spans: list[tuple[Matrices, int, int]] = []
    for expert, pairs in groups.items():
        start = len(order)
        for offset, pair in enumerate(pairs):
            place[pair] = start + offset
        order += pairs + pairs[:1] * (-len(pairs) % ROW_STEP)
        spans.append((table[expert], start, len(order)))
    at = torch.tensor(order, device=x_MD.device)
    x = x_MD[at // share]
    x = rounding(x) if rounding else x
    gate_up = torch.cat([product_in_steps(x[a:b], one.w13) for one, a, b in spans])
    inner = swiglu(gate_up, limit, weights_N[at])
    inner = rounding(inner) if rounding else inner
    out = torch.cat([product_in_steps(inner[a:b], one.w2) for one, a, b in spans])
    return out[torch.tensor(place, device=x_MD.device)]
