"""Hyper-connections around a block: collapse the streams into its input, spread its output.

Legend: T tokens, C streams, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.activation import sigmoid
from whalepod.kernels.linear import linear
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.sinkhorn import sinkhorn


def project(x_TCD: Tensor, fn: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the streams in fp32 and their projection scaled by one RMS over all streams."""
    wide = x_TCD.float()
    flat = wide.flatten(1)
    rms_T1 = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    return wide, linear(flat, fn) * rms_T1


@Kernel
def hyper_pre(
    x_TCD: Tensor,
    fn: Tensor,
    base: Tensor,
    scales: Tensor,
    norm_D: Tensor | None,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a block's input and say how to spread its output.

    Args:
        x_TCD: `[T, C, D]`, the residual streams.
        fn: `[(2+C)*C, C*D]` fp32; outputs are pre, post, then the mixing matrix row-major.
        base, scales: `[(2+C)*C]` fp32.
        norm_D: weight of the block's input norm, or None for the bare sum.
        iters, eps: of the Sinkhorn normalisation. norm_eps: of both norms.

    Returns:
        y `[T, D]` in the dtype of `x_TCD`; post `[T, C]` and comb `[T, C, C]` fp32.
    """
    streams = x_TCD.shape[1]
    wide_TCD, mixes = project(x_TCD, fn, norm_eps)
    mixes = mixes * scales + base
    gates = sigmoid(mixes[:, : 2 * streams])
    comb = sinkhorn(mixes[:, 2 * streams :].unflatten(-1, (streams, streams)), iters, eps)
    pre = gates[:, :streams] + eps
    y_TD = torch.bmm(pre.unsqueeze(1), wide_TCD).squeeze(1).to(x_TCD.dtype)
    if norm_D is not None:
        y_TD = rms_norm(y_TD, norm_D, norm_eps)
    return y_TD, 2 * gates[:, streams:], comb


@Kernel
def hyper_head(
    x_TCD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams for the last time, `[T, C, D]` to `[T, D]` in the same dtype.

    Args:
        fn: `[C, C*D]` fp32. base: `[C]`. scale: `[1]`.
        eps: added to the weights. norm_eps: of the norm over all streams.
    """
    wide_TCD, mixes_TC = project(x_TCD, fn, norm_eps)
    weight_TC = sigmoid(mixes_TC * scale + base) + eps
    return torch.bmm(weight_TC.unsqueeze(1), wide_TCD).squeeze(1).to(x_TCD.dtype)


@Kernel
def hyper_post(
    f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor, more_TD: Tensor | None = None
) -> Tensor:
    """Spread a block's output over the streams: `X'[k] = post[k] F + sum_j comb[j, k] X[j]`.

    Args:
        more_TD: added to `f_TD` first, in fp32.

    Returns:
        `[T, C, D]` in the dtype of `x_TCD`. The sum runs over the first index of `comb_TCC`.
    """
    if more_TD is not None:
        f_TD = (f_TD + more_TD.float()).to(x_TCD.dtype)
    spread = post_TC.unsqueeze(-1) * f_TD.float().unsqueeze(1)
    return torch.baddbmm(spread, comb_TCC.transpose(1, 2), x_TCD.float()).to(x_TCD.dtype)
