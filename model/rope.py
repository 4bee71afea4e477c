"""Rotary positions: adjacent pairs in the last dims, YaRN on compressed layers, and the inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whalepod.kernels.positions import turns
from whalepod.kernels.rope import rotate_
from whalepod.model.shape import ModelConfig

__all__ = ["frequencies", "rotate_", "turns"]


def frequencies(config: ModelConfig, layer: int) -> Tensor:
    """Angular frequency of each rotated pair.

    Layers without compression (and the MTP block) use `rope_theta` unscaled; all others use
    `compress_rope_theta` with static YaRN for queries, window keys and compressed entries alike.
    There is no attention-temperature factor.

    Returns:
        `[rd/2]` fp32, radians per position.
    """
    dims = config.qk_rope_head_dim
    compressed = config.ratio(layer) != 0
    base = config.compress_rope_theta if compressed else config.rope_theta
    freqs = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    yarn = config.rope_scaling
    if not compressed or yarn is None:
        return freqs

    def turning_point(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning_point(yarn.beta_fast)), 0)
    high = min(math.ceil(turning_point(yarn.beta_slow)), dims - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freqs * (1 - ramp) + freqs / yarn.factor * ramp
