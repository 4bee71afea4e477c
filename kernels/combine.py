"""Sum what the experts sent back, in an order that no layout changes."""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.registry import Kernel


@Kernel
def combine(parts_TKD: Tensor) -> Tensor:
    """Add each token's expert outputs one after the other.

    Args:
        parts_TKD: `[T, K, D]`, the k-th choice's output at index k, already weighted.

    Returns:
        `[T, D]` fp32. The order of the sum is the order of the router's choices, so every
        placement of experts on shards gives the same bits.
    """
    total = parts_TKD[:, 0].float()
    for k in range(1, parts_TKD.shape[1]):
        total = total + parts_TKD[:, k]
    return total
