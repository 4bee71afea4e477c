"""Matrix products whose rows do not depend on how many rows there are.

Legend: M rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel

# CPU BLAS takes another summation order below 4 rows, and splits odd small row counts over
# threads. Padding to a multiple of 4 below 16 keeps every row's bits the same for every M, so
# a token's value does not depend on its company (tests/test_linear.py).
ROW_STEP, _SAFE = 4, 16


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """Pad the first dim with zeros where CPU BLAS would sum differently; also the true count."""
    rows = x.shape[0]
    if rows < _SAFE and rows % ROW_STEP and x.device.type == "cpu":
        x = F.pad(x, (*(0, 0) * (x.ndim - 1), 0, -rows % ROW_STEP))
    return x, rows


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
    x_MK, rows = padded_rows(x_MK)
    return torch.mm(x_MK, weight_NK.t())[:rows]


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
    x_MGK, rows = padded_rows(x_MGK)
    out = torch.bmm(x_MGK.transpose(0, 1), weight_GNK.transpose(1, 2))
    return out.transpose(0, 1)[:rows].flatten(1)


from whalepod.kernels import linear_triton  # noqa: E402, F401  (registers the twins)
