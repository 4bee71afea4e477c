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
_STEP, _SAFE = 4, 16


def _needs_padding(x: Tensor, rows: int) -> bool:
    return rows < _SAFE and rows % _STEP != 0 and x.device.type == "cpu"


@Kernel
def linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply rows by a stored `[out, in]` matrix: `y = x Wᵀ`.

    Args:
        x_MK: `[M, K]`, fp32 or bf16; M may be 0.
        weight_NK: `[N, K]`, the dtype of `x_MK`.

    Returns:
        `[M, N]` in that dtype. On CPU in fp32 row i is bit-equal for every M and every company.
    """
    rows = x_MK.shape[0]
    if _needs_padding(x_MK, rows):
        x_MK = F.pad(x_MK, (0, 0, 0, -rows % _STEP))
        return torch.mm(x_MK, weight_NK.t())[:rows]
    return torch.mm(x_MK, weight_NK.t())


@Kernel
def grouped_linear(x_MGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """Multiply each group of inputs by its own matrix (block-diagonal product).

    Args:
        x_MGK: `[M, G, K]`.
        weight_GNK: `[G, N, K]`, the same dtype.

    Returns:
        `[M, G * N]`; rows as independent of M as those of `linear`.
    """
    rows = x_MGK.shape[0]
    if _needs_padding(x_MGK, rows):
        x_MGK = F.pad(x_MGK, (0, 0, 0, 0, 0, -rows % _STEP))
    out = torch.bmm(x_MGK.transpose(0, 1), weight_GNK.transpose(1, 2))
    return out.transpose(0, 1)[:rows].flatten(1)
