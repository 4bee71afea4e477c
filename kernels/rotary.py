"""Root-mean-square norm and rotary positions of heads, in one operation.

Legend: T rows, H heads, D head_dim, P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm


def rotate_(x: Tensor, turns_TP: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last `rd` dims of `x` in place; returns `x`.

    Args:
        x: `[T, D]` or `[T, heads, D]`, fp32 or bf16.
        turns_TP: `[T, rd/2]` complex64, `exp(i * position * frequency)`.
        inverse: rotate by the negative angle (attention output).
    """
    pairs = turns_TP.shape[-1]
    if x.ndim == 3:
        turns_TP = turns_TP.unsqueeze(1)
    if inverse:
        turns_TP = turns_TP.conj()
    tail = x[..., x.shape[-1] - 2 * pairs :]
    if x.dtype == torch.float32:
        torch.view_as_complex(tail.unflatten(-1, (pairs, 2))).mul_(turns_TP)
    else:
        wide = torch.view_as_complex(tail.float().unflatten(-1, (pairs, 2))) * turns_TP
        tail.copy_(torch.view_as_real(wide).flatten(-2))
    return x


@Kernel
def norm_rotate(x_THD: Tensor, weight_D: Tensor | None, turns_TP: Tensor, eps: float) -> Tensor:
    """Normalise every head, then rotate its last dims.

    Args:
        x_THD: `[T, H, D]`, fp32 or bf16; may be part of a wider tensor.
        weight_D: of the norm, or None for the unweighted one.
        turns_TP: `[T, P]` complex64.
        eps: added to the mean square; below 0 there is no norm.

    Returns:
        `[T, H, D]` in the dtype of `x_THD`.
    """
    x = x_THD.clone() if eps < 0 else rms_norm(x_THD, weight_D, eps)
    return rotate_(x, turns_TP)
