"""Hyper-connections: four residual streams, mixed before and after each half of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.model.shape import ModelConfig


def mixing(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn: row softmax + eps, then columns and rows in turn, ending on columns."""
    mix = torch.softmax(logits, dim=-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def hyper_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams `[B, T, C, D]` -> block input `[B, T, D]`, post `[B, T, C]`, comb `[B, T, C, C]`."""
    c = config.hc_mult
    flat = x.flatten(2)
    rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    mixes = F.linear(flat, fn) * rms
    pre = torch.sigmoid(mixes[..., :c] * scale[0] + base[:c]) + config.hc_eps
    post = 2 * torch.sigmoid(mixes[..., c : 2 * c] * scale[1] + base[c : 2 * c])
    logits = (mixes[..., 2 * c :] * scale[2] + base[2 * c :]).unflatten(-1, (c, c))
    comb = mixing(logits, config.hc_sinkhorn_iters, config.hc_eps)
    return (pre.unsqueeze(-1) * x).sum(2), post, comb


def hyper_post(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`X'[k] = post[k] F + sum_j comb[j, k] X[j]`."""
    out = post.unsqueeze(-1) * f.float().unsqueeze(2)
    for j in range(x.shape[2]):
        out = out + comb[:, :, j].unsqueeze(-1) * x[:, :, j].unsqueeze(2)
    return out


def hyper_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Tensor:
    """Collapse the streams for the last time."""
    flat = x.flatten(2)
    rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    weight = torch.sigmoid(F.linear(flat, fn) * rms * scale + base) + config.hc_eps
    return (weight.unsqueeze(-1) * x).sum(2)
