"""Matrix products whose rows do not depend on how many rows there are.

Legend: M rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel

# CPU BLAS chooses its kernel, and with it the order of sums, by the number of rows, each processor
# another way. Products of this many rows at a time, filled up with zeros, take one kernel always, so a
# token's value does not depend on its company (tests/test_linear.py).
ROW_STEP = 16


def product_in_steps(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply, `x Wᵀ`, `ROW_STEP` rows at a time on a CPU; M a multiple of that there."""
    if x_MK.device.type != "cpu" or x_MK.shape[0] <= ROW_STEP:
        return torch.mm(x_MK, weight_NK.t())
    return torch.cat([torch.mm(x, weight_NK.t()) for x in x_MK.split(ROW_STEP)])


def filled_up(x: Tensor) -> Tensor:
    """Fill the first dim up to whole steps with zeros where products go by steps."""
    if x.device.type != "cpu":
        return x
    return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, -x.shape[0] % ROW_STEP))


@Kernel
def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply rows by a stored `[out, in]` matrix: `y = x Wᵀ`.

    Args:
        x_MK: `[M, K]`, fp32 or bf16; M may be 0.
        weight_NK: `[N, K]`, the dtype of `x_MK`.

    Returns:
        `[M, N]` in that dtype. On CPU in fp32, with K a multiple of 16, row i is bit-equal for every
        M and every company.
    """
    rows, x_MK = x_MK.shape[0], filled_up(x_MK)
    return product_in_steps(x_MK, weight_NK)[:rows]


@Kernel
def linear_wide(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """As `linear`, with products and result in fp32: `[M, N]` fp32.

    Args:
        x_MK, weight_NK: fp32 or bf16, either of them.
    """
    return linear(x_MK.float(), weight_NK.float())


@Kernel
def grouped_linear(x_MGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """Multiply each group of inputs by its own matrix (block-diagonal product).

    Args:
        x_MGK: `[M, G, K]`.
        weight_GNK: `[G, N, K]`, the same dtype.

    Returns:
        `[M, G * N]`; rows as independent of M as those of `linear`.
    """
    rows, x_MGK = x_MGK.shape[0], filled_up(x_MGK)
    groups = zip(x_MGK.unbind(1), weight_GNK, strict=True)
    return torch.cat([product_in_steps(x, weight)[:rows] for x, weight in groups], dim=1)


from whalepod.kernels import linear_triton  # noqa: E402, F401  (registers the twins)
