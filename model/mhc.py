"""Manifold-constrained hyper-connections: four residual streams, mixed before and after each block.

Legend: T tokens, C streams (hc_mult), D width (hidden_size). All mixing is done in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.hyper import hyper_head, hyper_post, hyper_pre
from whalepod.kernels.sinkhorn import sinkhorn
from whalepod.model.shape import ModelConfig

__all__ = ["HyperConnection", "HyperHead", "hc_post", "hc_pre", "sinkhorn"]


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
    return _pre(x_TCD, fn, base, scale.repeat_interleave(sizes), None, config)


def _pre(
    x_TCD: Tensor,
    fn: Tensor,
    base: Tensor,
    scales: Tensor,
    norm_D: Tensor | None,
    config: ModelConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre` with the three scales already spread over the outputs, and the block's norm."""
    return hyper_pre(
        *(x_TCD, fn, base, scales, norm_D),
        *(config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps),
    )


def hc_post(f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor) -> Tensor:
    """Spread a block's output over the streams: `X'[k] = post[k] F + sum_j comb[j, k] X[j]`.

    Returns:
        `[T, C, D]` in the dtype of `x_TCD`. The sum runs over the first index of `comb_TCC`.
    """
    return hyper_post(f_TD, x_TCD, post_TC, comb_TCC)


class HyperConnection:
    """One site's parameters (`hc_attn_*` or `hc_ffn_*` of a layer)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.fn, self.base, scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))
        streams = config.hc_mult
        sizes = torch.tensor([streams, streams, streams * streams], device=scale.device)
        self.scales = scale.repeat_interleave(sizes)

    def pre(self, x_TCD: Tensor, norm_D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `hc_pre`; with `norm_D` the block's input is normalised with that weight."""
        return _pre(x_TCD, self.fn, self.base, self.scales, norm_D, self.config)


class HyperHead:
    """Collapse the streams for the last time (`hc_head_*`): no Sinkhorn, no factor 2."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.fn, self.base, self.scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))

    def __call__(self, x_TCD: Tensor) -> Tensor:
        """`[T, C, D]` -> `[T, D]` in the same dtype."""
        config = self.config
        eps, norm_eps = config.hc_eps, config.rms_norm_eps
        return hyper_head(x_TCD, self.fn, self.base, self.scale, eps, norm_eps)
