"""Walsh-Hadamard rotation of the indexer's vectors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from whalepod.kernels.linear import linear
from whalepod.kernels.registry import Kernel


@cache
def matrix(size: int) -> Tensor:
    """Return the Sylvester-ordered Hadamard matrix over sqrt(size), `[size, size]` fp32.

    It is symmetric and its own inverse. `size` is a power of two.
    """
    out = torch.ones(1, 1)
    while out.shape[0] < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)], 0)
    scaled: Tensor = out * size**-0.5
    return scaled


@Kernel
def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dim (a power of two) of `[..., D]`; the dtype is kept.

    Rotating queries and keys alike leaves their products unchanged; it spreads outliers so that
    FP4 rounds them well.
    """
    rotation = matrix(x.shape[-1]).to(x.device, x.dtype)
    return linear(x.flatten(0, -2), rotation).view(x.shape)
