"""Manifold-constrained hyper-connections: four residual streams, mixed before and after each block.

Legend: T tokens, C streams (hc_mult), D width (hidden_size). All mixing is done in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.activation import sigmoid
from whalepod.kernels.linear import linear
from whalepod.kernels.sinkhorn import sinkhorn
from whalepod.model.shape import ModelConfig

__all__ = ["HyperConnection", "HyperHead", "hc_post", "hc_pre", "sinkhorn"]


def _project(x_TCD: Tensor, fn: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the streams in fp32 and their projection scaled by one RMS over all streams."""
    wide = x_TCD.float()
    flat = wide.flatten(1)
    rms_T1 = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    return wide, linear(flat, fn) * rms_T1


def hc_pre(
    x_TCD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a block's input and say how to spread its output.

    Args:
        x_TCD: `[T, C, D]`, the residual streams.
        fn: `[(2+C)*C, C*D]` fp32; outputs are pre, post, then the mixing matrix row-major.
        base: `[(2+C)*C]` fp32.
        scale: `[3]` fp32, for pre, post and the matrix.
        config: for `hc_mult`, `hc_sinkhorn_iters`, `hc_eps`, `rms_norm_eps`.

    Returns:
        y `[T, D]` in the dtype of `x_TCD`; post `[T, C]` and comb `[T, C, C]` fp32.
    """
    streams = config.hc_mult
    sizes = torch.tensor([streams, streams, streams * streams], device=scale.device)
    return _pre(x_TCD, fn, base, scale.repeat_interleave(sizes), config)


def _pre(
    x_TCD: Tensor, fn: Tensor, base: Tensor, scales: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre` with the three scales already spread over the outputs."""
    streams = config.hc_mult
    wide_TCD, mixes = _project(x_TCD, fn, config.rms_norm_eps)
    mixes = mixes * scales + base
    gates = sigmoid(mixes[:, : 2 * streams])
    comb = sinkhorn(
        mixes[:, 2 * streams :].unflatten(-1, (streams, streams)),
        config.hc_sinkhorn_iters,
        config.hc_eps,
    )
    pre = gates[:, :streams] + config.hc_eps
    y_TD = torch.bmm(pre.unsqueeze(1), wide_TCD).squeeze(1)
    return y_TD.to(x_TCD.dtype), 2 * gates[:, streams:], comb


def hc_post(f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor) -> Tensor:
    """Spread a block's output over the streams: `X'[k] = post[k] F + sum_j comb[j, k] X[j]`.

    Returns:
        `[T, C, D]` in the dtype of `x_TCD`. The sum runs over the first index of `comb_TCC`.
    """
    spread = post_TC.unsqueeze(-1) * f_TD.float().unsqueeze(1)
    return torch.baddbmm(spread, comb_TCC.transpose(1, 2), x_TCD.float()).to(x_TCD.dtype)


class HyperConnection:
    """One site's parameters (`hc_attn_*` or `hc_ffn_*` of a layer)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.fn, self.base, scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))
        streams = config.hc_mult
        sizes = torch.tensor([streams, streams, streams * streams], device=scale.device)
        self.scales = scale.repeat_interleave(sizes)

    def pre(self, x_TCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `hc_pre`."""
        return _pre(x_TCD, self.fn, self.base, self.scales, self.config)


class HyperHead:
    """Collapse the streams for the last time (`hc_head_*`): no Sinkhorn, no factor 2."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.fn, self.base, self.scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))

    def __call__(self, x_TCD: Tensor) -> Tensor:
        """`[T, C, D]` -> `[T, D]` in the same dtype."""
        wide_TCD, mixes_TC = _project(x_TCD, self.fn, self.config.rms_norm_eps)
        weight_TC = sigmoid(mixes_TC * self.scale + self.base) + self.config.hc_eps
        return torch.bmm(weight_TC.unsqueeze(1), wide_TCD).squeeze(1).to(x_TCD.dtype)
