"""Manifold-constrained hyper-connections: four residual streams, mixed before and after each block.

Legend: T tokens, C streams (hc_mult), D width (hidden_size). All mixing is done in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels import hyper_connection as kernels
from whalepod.kernels.hyper_connection import Site, hc_post
from whalepod.kernels.sinkhorn import sinkhorn
from whalepod.model.shape import ModelConfig

__all__ = ["HyperConnection", "HyperHead", "hc_post", "hc_pre", "sinkhorn"]


def _site(fn: Tensor, base: Tensor, scales: Tensor, config: ModelConfig) -> Site:
    return Site(fn, base, scales, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)


def _spread(scale: Tensor, streams: int) -> Tensor:
    """Repeat the three scales over the outputs they belong to."""
    sizes = torch.tensor([streams, streams, streams * streams], device=scale.device)
    return scale.repeat_interleave(sizes)


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
    return kernels.hc_pre(x_TCD, _site(fn, base, _spread(scale, config.hc_mult), config))


class HyperConnection:
    """One site's parameters (`hc_attn_*` or `hc_ffn_*` of a layer)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        fn, base, scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))
        self.site = _site(fn, base, _spread(scale, config.hc_mult), config)

    def pre(self, x_TCD: Tensor, norm_D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `hc_pre`; y is normalised with the weight `norm_D` if there is one."""
        return kernels.hc_pre(x_TCD, self.site, norm_D)

    def post_pre(
        self,
        f_TD: Tensor,
        x_TCD: Tensor,
        post_TC: Tensor,
        comb_TCC: Tensor,
        norm_D: Tensor | None = None,
        more_TD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`hc_post` of the block before, then `pre`; returns the new streams first."""
        return kernels.hc_post_pre(f_TD, x_TCD, post_TC, comb_TCC, self.site, norm_D, more_TD)


class HyperHead:
    """Collapse the streams for the last time (`hc_head_*`): no Sinkhorn, no factor 2."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        fn, base, scale = (weights[f"{prefix}_{p}"] for p in ("fn", "base", "scale"))
        self.site = _site(fn, base, scale.expand(config.hc_mult).contiguous(), config)

    def __call__(self, x_TCD: Tensor, norm_D: Tensor | None = None) -> Tensor:
        """`[T, C, D]` -> `[T, D]` in the same dtype, normalised with `norm_D` if given."""
        return kernels.hc_head(x_TCD, self.site, norm_D)
