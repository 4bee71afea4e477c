"""Hyper-connections around a block: spread its output over the residual streams, collapse them again.

Legend: T tokens, C streams, D width, N outputs of a site's projection, K experts a token. All mixing is done
in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.kernels.activation import sigmoid
from whalepod.kernels.combine import combine
from whalepod.kernels.jit import runs
from whalepod.kernels.linear import linear
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.sinkhorn import sinkhorn


@dataclass(frozen=True, slots=True)
class Site:
    """Parameters of one place where streams are collapsed.

    Args:
        fn: `[N, C*D]` fp32, N = (2+C)*C: pre, post, then the mixing matrix row-major; or N = C, pre
            alone, for `hc_head`.
        base, scales: `[N]` fp32.
        iters: of Sinkhorn's normalisation.
        eps: `hc_eps`.
        rms_eps: `rms_norm_eps`.
    """

    fn: Tensor
    base: Tensor
    scales: Tensor
    iters: int
    eps: float
    rms_eps: float


def _project(x_TCD: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Return the streams in fp32 and the arguments of the gates: one RMS over all streams."""
    wide = x_TCD.float()
    flat = wide.flatten(1)
    rms_T1 = torch.rsqrt(flat.square().mean(-1, keepdim=True) + site.rms_eps)
    return wide, linear(flat, site.fn) * rms_T1 * site.scales + site.base


def _collapse(wide_TCD: Tensor, pre_TC: Tensor, kind: torch.dtype) -> Tensor:
    return torch.bmm(pre_TC.unsqueeze(1), wide_TCD).squeeze(1).to(kind)


def _normed(y_TD: Tensor, norm_D: Tensor | None, site: Site) -> Tensor:
    return y_TD if norm_D is None else rms_norm.reference(y_TD, norm_D, site.rms_eps)


@Kernel
def hc_pre(
    x_TCD: Tensor, site: Site, norm_D: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a block's input and say how to spread its output.

    Args:
        x_TCD: `[T, C, D]`, the residual streams, bf16 or fp32.
        site: N = (2+C)*C outputs.
        norm_D: `[D]` fp32, weight of an RMSNorm over the collapsed stream, or None for no norm.

    Returns:
        y `[T, D]` in the dtype of `x_TCD`; post `[T, C]` and comb `[T, C, C]` fp32.
    """
    streams = x_TCD.shape[1]
    wide_TCD, mixes = _project(x_TCD, site)
    gates = sigmoid(mixes[:, : 2 * streams])
    logits = mixes[:, 2 * streams :].unflatten(-1, (streams, streams))
    comb = sinkhorn(logits, site.iters, site.eps)
    y_TD = _collapse(wide_TCD, gates[:, :streams] + site.eps, x_TCD.dtype)
    return _normed(y_TD, norm_D, site), 2 * gates[:, streams:], comb


@Kernel
def hc_head(x_TCD: Tensor, site: Site, norm_D: Tensor | None = None) -> Tensor:
    """Collapse the streams for the last time: no Sinkhorn, no factor 2; N = C.

    Returns:
        `[T, D]` in the dtype of `x_TCD`, after the RMSNorm of `norm_D` if there is one.
    """
    wide_TCD, mixes_TC = _project(x_TCD, site)
    y_TD = _collapse(wide_TCD, sigmoid(mixes_TC) + site.eps, x_TCD.dtype)
    return _normed(y_TD, norm_D, site)


@Kernel
def hc_post(
    f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor, more_TD: Tensor | None = None
) -> Tensor:
    """Spread a block's output over the streams: `X'[k] = post[k] F + sum_j comb[j, k] X[j]`.

    Args:
        f_TD: or `[T, K, D]`, a token's parts, which are added up first as `combine` does.
        more_TD: added to `f_TD` first, in fp32.

    Returns:
        `[T, C, D]` in the dtype of `x_TCD`. The sum runs over the first index of `comb_TCC`.
    """
    if f_TD.dim() == 3:
        f_TD = combine.reference(f_TD)
    if more_TD is not None:
        f_TD = (f_TD + more_TD.float()).to(x_TCD.dtype)
    spread = post_TC.unsqueeze(-1) * f_TD.float().unsqueeze(1)
    return torch.baddbmm(spread, comb_TCC.transpose(1, 2), x_TCD.float()).to(x_TCD.dtype)


@Kernel
def hc_post_pre(
    f_TD: Tensor,
    x_TCD: Tensor,
    post_TC: Tensor,
    comb_TCC: Tensor,
    site: Site,
    norm_D: Tensor | None = None,
    more_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hc_post` of one block, then `hc_pre` of the next over the streams that it made.

    Returns:
        the new streams `[T, C, D]`, then what `hc_pre` returns for them.
    """
    x_TCD = hc_post.reference(f_TD, x_TCD, post_TC, comb_TCC, more_TD)
    return x_TCD, *hc_pre.reference(x_TCD, site, norm_D)


from whalepod.kernels import hyper_connection_triton as _twins  # noqa: E402

hc_pre.twin("triton", runs)(_twins.pre)
hc_head.twin("triton", runs)(_twins.head)
hc_post.twin("triton", runs)(_twins.post)
hc_post_pre.twin("triton", runs)(_twins.post_pre)
