"""What every part uses: a layer's kind, products, norms and rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What distinguishes a layer's graph; equal kinds share one compiled graph.

    Args:
        ratio: 0, 4 or 128. hashed: experts by token id. dense: the indexer's choice is not used.
        dtype: of the matrix products. quantise: experts rounded to FP4, gradients straight through.
    """

    ratio: int
    hashed: bool
    dense: bool
    dtype: torch.dtype
    quantise: bool


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T` in `dtype`."""
    return F.linear(x.to(dtype), weight.to(dtype))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dim in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide if weight is None else wide * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last `2 * cos.shape[-1]` dims; `cos` broadcasts over heads."""
    size = 2 * cos.shape[-1]
    still, tail = x[..., :-size], x[..., -size:].float().unflatten(-1, (-1, 2))
    a, b = tail[..., 0], tail[..., 1]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([still.float(), turned], dim=-1)
