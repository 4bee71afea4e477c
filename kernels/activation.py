"""Elementwise functions of a few columns, bit-equal for every number of rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel

# CPU code computes the last few elements of a tensor one by one, with another exponential than
# the vectorised rest; whole multiples of this many elements have no such rest.
_VECTOR = 32


def whole_vectors(x_MN: Tensor) -> Tensor:
    """Pad the rows of `[M, N]` so that no element is computed apart from the vectors."""
    if x_MN.numel() % _VECTOR and x_MN.device.type == "cpu":
        rows = _VECTOR // math.gcd(_VECTOR, x_MN.shape[1])
        x_MN = F.pad(x_MN, (0, 0, 0, -x_MN.shape[0] % rows))
    return x_MN.contiguous()


@Kernel
def sigmoid(x_MN: Tensor) -> Tensor:
    """Logistic function of `[M, N]` fp32."""
    return torch.sigmoid(whole_vectors(x_MN))[: x_MN.shape[0]]


@Kernel
def sqrt_softplus(x_MN: Tensor) -> Tensor:
    """`sqrt(log(1 + exp(x)))` of `[M, N]` fp32 (beta 1, linear above 20): the router's scores."""
    return F.softplus(whole_vectors(x_MN))[: x_MN.shape[0]].sqrt()
