"""Triton source of `hyper_connection`, for four streams.

Two launches. The first goes over the streams in tiles of 16 tokens by COLS columns: it spreads the
block's output over them (TOP), writes them, and multiplies what it wrote by its part of the
projection (PROJECT). The second adds the parts up in their order; a few of its programs do Sinkhorn's
normalisation while the others collapse the streams, one token each.

Parts are `[T, splits, 32]`: columns 0-3 pre, 4 the sum of squares, 8-11 post, 12-27 the matrix. How
columns are split does not depend on T, so a row's bits do not depend on the other rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from whalepod.kernels.jit import FIXED, INTERPRETED, jit, tl, triton
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.sinkhorn_triton import logistic, place, sinkhorn

if TYPE_CHECKING:
    from whalepod.kernels.hyper_connection import Site

COLS, TOKENS, SINKHORN, WARPS, SWAP = 64, 16, 4, 4, 0
# From so many tokens on a program takes so many tiles, so that the projection is fetched less often.
REPEATS = (512, 8), (256, 4), (0, 1)
# Tokens of one launch, which bounds the memory for parts.
CHUNK = 8192


@jit
def _times(acc, x, w, EXACT: tl.constexpr):
    """Add `x w`: x is bf16, w fp32 and taken as the sum of three bf16, so nothing is lost."""
    if EXACT:
        return tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
    # An opaque copy: else what made x would be computed again, in the layout of the product.
    x = tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", args=[x], dtype=tl.bfloat16, is_pure=False, pack=2
    )
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low, acc)))


@jit
def _spread(f, x0, x1, x2, x3, post, comb, t, live, K: tl.constexpr):
    """Stream K of `hc_post`, `[TOKENS, COLS]` fp32."""
    out = tl.load(post + t * 4 + K, mask=live, other=0.0)[:, None] * f
    out = tl.fma(tl.load(comb + t * 16 + K, mask=live, other=0.0)[:, None], x0, out)
    out = tl.fma(tl.load(comb + t * 16 + 4 + K, mask=live, other=0.0)[:, None], x1, out)
    out = tl.fma(tl.load(comb + t * 16 + 8 + K, mask=live, other=0.0)[:, None], x2, out)
    return tl.fma(tl.load(comb + t * 16 + 12 + K, mask=live, other=0.0)[:, None], x3, out)


@jit
def _weights(fn, column, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Stream K's part of the projection, `[COLS, 32]` fp32."""
    row, real = place(tl.arange(0, 32))
    kept = (real & (row < N))[None, :] & (column < D)[:, None]
    return tl.load(fn + row[None, :] * (4 * D) + (K * D + column)[:, None], mask=kept, other=0.0)


@jit
def _squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@jit
def _added(f, t, column, kept, D: tl.constexpr, TOP: tl.constexpr):
    """Outputs of a block, `[TOKENS, COLS]` fp32; TOP of them a token are added up in their order."""
    at = f + t[:, None] * (TOP * D) + column[None, :]
    total = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    for k in tl.static_range(1, TOP):
        total += tl.load(at + k * D, mask=kept, other=0.0).to(tl.float32)
    return total


@jit
def mix_kernel(
    f, more, x, post, comb, out, fn, parts, T,
    D: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, TOP: tl.constexpr,
    PROJECT: tl.constexpr, EXACT: tl.constexpr, CUTS: tl.constexpr, TOKENS: tl.constexpr,
    COLS: tl.constexpr, REPEAT: tl.constexpr, SWAP: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """First launch, over `[T, 4, D]`: REPEAT tiles.

    TOP outputs of a block are spread, where it is 0 `out` and `f` are not looked at.
    """
    split = tl.program_id(SWAP)
    column = split * COLS + tl.arange(0, COLS)
    if PROJECT:  # weights do not wait
        w0, w1 = _weights(fn, column, D, N, 0), _weights(fn, column, D, N, 1)
        w2, w3 = _weights(fn, column, D, N, 2), _weights(fn, column, D, N, 3)
    begin(EARLY)
    kind = x.dtype.element_ty
    for i in range(REPEAT):
        t = ((tl.program_id(1 - SWAP) * REPEAT + i) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        live = t < T
        kept = live[:, None] & (column < D)[None, :]
        at = t[:, None] * (4 * D) + column[None, :]
        x0, x1 = tl.load(x + at, mask=kept, other=0.0), tl.load(x + at + D, mask=kept, other=0.0)
        x2 = tl.load(x + at + 2 * D, mask=kept, other=0.0)
        x3 = tl.load(x + at + 3 * D, mask=kept, other=0.0)
        if TOP > 0:
            wide = _added(f, t, column, kept, D, TOP)
            if more is not None:
                wide += tl.load(more + t[:, None] * D + column[None, :], mask=kept, other=0.0)
                wide = rounded(wide, kind, CUTS).to(tl.float32)
            a, b, c, d = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
            x0 = rounded(_spread(wide, a, b, c, d, post, comb, t, live, 0), kind, CUTS)
            x1 = rounded(_spread(wide, a, b, c, d, post, comb, t, live, 1), kind, CUTS)
            x2 = rounded(_spread(wide, a, b, c, d, post, comb, t, live, 2), kind, CUTS)
            x3 = rounded(_spread(wide, a, b, c, d, post, comb, t, live, 3), kind, CUTS)
            tl.store(out + at, x0, mask=kept)
            tl.store(out + at + D, x1, mask=kept)
            tl.store(out + at + 2 * D, x2, mask=kept)
            tl.store(out + at + 3 * D, x3, mask=kept)
        if PROJECT:
            acc = tl.zeros((TOKENS, 32), tl.float32)
            acc = _times(_times(acc, x0, w0, EXACT), x1, w1, EXACT)
            acc = _times(_times(acc, x2, w2, EXACT), x3, w3, EXACT)
            squares = _squares(x0) + _squares(x1) + _squares(x2) + _squares(x3)
            n = tl.arange(0, 32)
            acc = tl.where((n == 4)[None, :], squares[:, None], acc)
            where = parts + (t * SPLITS + split)[:, None] * 32 + n[None, :]
            tl.store(where, acc, mask=live[:, None] & ((N > 4) | (n < 8))[None, :])


@jit
def finish_kernel(
    x, parts, scales, base, norm, y, post, comb, T, SINKS,
    D: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr, ITERS: tl.constexpr,
    EPS: tl.constexpr, RMS_EPS: tl.constexpr, NORM: tl.constexpr, CUTS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """The first SINKS programs finish gates and matrices, each other one collapses a token."""
    pid = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    kept = d < D
    if NORM:  # weights do not wait
        weight = tl.load(norm + d, mask=kept, other=0.0)
    begin(EARLY)
    if pid < SINKS:
        sinkhorn(
            parts, scales, base, post, comb, pid * TOKENS, T, D, SPLITS, ITERS, EPS, RMS_EPS, TOKENS
        )
        return
    t = (pid - SINKS).to(tl.int64)
    at = x + t * (4 * D) + d
    x0, x1 = tl.load(at, mask=kept, other=0.0), tl.load(at + D, mask=kept, other=0.0)
    x2, x3 = tl.load(at + 2 * D, mask=kept, other=0.0), tl.load(at + 3 * D, mask=kept, other=0.0)
    split, n = tl.arange(0, SLOTS), tl.arange(0, 8)
    part = tl.load(
        parts + (t * SPLITS + split)[:, None] * 32 + n[None, :],
        mask=(split < SPLITS)[:, None], other=0.0,
    )  # fmt: skip
    total = tl.sum(part, 0)
    rms = 1.0 / tl.sqrt(tl.sum(tl.where(n == 4, total, 0.0)) / (4 * D) + RMS_EPS)
    scale = tl.load(scales + n, mask=n < 4, other=0.0)
    shift = tl.load(base + n, mask=n < 4, other=0.0)
    gate = logistic(total * rms * scale + shift) + EPS
    out = tl.sum(tl.where(n == 0, gate, 0.0)) * x0.to(tl.float32)
    out = tl.fma(tl.sum(tl.where(n == 1, gate, 0.0)), x1.to(tl.float32), out)
    out = tl.fma(tl.sum(tl.where(n == 2, gate, 0.0)), x2.to(tl.float32), out)
    out = tl.fma(tl.sum(tl.where(n == 3, gate, 0.0)), x3.to(tl.float32), out)
    kind = y.dtype.element_ty
    if NORM:
        out = rounded(out, kind, CUTS).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(out * out) / D + RMS_EPS)
        out = out * factor * weight
    tl.store(y + t * D + d, rounded(out, kind, CUTS), mask=kept)


def _mix(
    f: Tensor | None, more: Tensor | None, x: Tensor, post: Tensor | None, comb: Tensor | None, out: Tensor,
    fn: Tensor | None, parts: Tensor | None,
) -> None:  # fmt: skip
    tokens, _, width = x.shape
    splits = triton.cdiv(width, COLS)
    repeat = next(tiles for least, tiles in REPEATS if tokens >= least)
    tiles = triton.cdiv(tokens, TOKENS * repeat)
    mix_kernel[(tiles, splits) if SWAP else (splits, tiles)](
        f, more, x, post, comb, out, fn, parts, tokens,
        D=width, N=0 if fn is None else fn.shape[0], SPLITS=splits,
        TOP=0 if f is None else f.shape[1] if f.dim() == 3 else 1, PROJECT=fn is not None,
        EXACT=INTERPRETED or x.dtype == torch.float32, CUTS=INTERPRETED, TOKENS=TOKENS, COLS=COLS, REPEAT=repeat, SWAP=SWAP,
        num_warps=WARPS, **FIXED, **early(),
    )  # fmt: skip


def _run(
    f: Tensor | None, more: Tensor | None, x: Tensor, post: Tensor | None, comb: Tensor | None,
    site: Site, norm: Tensor | None, head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, streams, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x) if f is not None else x
    y, gates = x.new_empty(tokens, width), site.fn.new_empty(0 if head else tokens, streams)
    mixed = site.fn.new_empty(gates.shape[0], streams, streams)
    splits = triton.cdiv(width, COLS)
    for first in range(0, tokens, CHUNK):
        some = slice(first, first + CHUNK)
        parts = site.fn.new_empty(min(CHUNK, tokens - first), splits, 32)
        own = [None if t is None else t[some] for t in (f, more, post, comb)]
        _mix(own[0], own[1], x[some], own[2], own[3], out[some], site.fn, parts)
        sinks = 0 if head else triton.cdiv(parts.shape[0], SINKHORN)
        finish_kernel[(sinks + parts.shape[0],)](
            out[some], parts, site.scales, site.base, norm, y[some], gates[some], mixed[some],
            parts.shape[0], sinks,
            D=width, SPLITS=splits, SLOTS=triton.next_power_of_2(splits), ITERS=site.iters,
            EPS=site.eps, RMS_EPS=site.rms_eps, NORM=norm is not None, CUTS=INTERPRETED,
            TOKENS=SINKHORN, WIDTH=triton.next_power_of_2(width), num_warps=4, **FIXED, **early(),
        )  # fmt: skip
    return out, y, gates, mixed


def pre(x_TCD: Tensor, site: Site, norm_D: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `hc_pre`."""
    return _run(None, None, x_TCD, None, None, site, norm_D, head=False)[1:]


def head(x_TCD: Tensor, site: Site, norm_D: Tensor | None = None) -> Tensor:
    """Twin of `hc_head`."""
    return _run(None, None, x_TCD, None, None, site, norm_D, head=True)[1]


def post(
    f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor, more_TD: Tensor | None = None
) -> Tensor:
    """Twin of `hc_post`."""
    x_TCD = x_TCD.contiguous()
    out = torch.empty_like(x_TCD)
    more = None if more_TD is None else more_TD.contiguous()
    if len(x_TCD):
        gates = post_TC.contiguous(), comb_TCC.contiguous()
        _mix(f_TD.contiguous(), more, x_TCD, *gates, out, None, None)
    return out


def post_pre(
    f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor, site: Site,
    norm_D: Tensor | None = None, more_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Twin of `hc_post_pre`."""
    gates = post_TC.contiguous(), comb_TCC.contiguous()
    more = None if more_TD is None else more_TD.contiguous()
    return _run(f_TD.contiguous(), more, x_TCD, *gates, site, norm_D, head=False)
