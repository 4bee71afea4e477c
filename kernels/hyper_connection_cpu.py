"""Compiled twins of the hyper-connections, for four streams.

A token's 4 x 4 mixing matrix is one vector, so a Sinkhorn step is four shuffles and a division.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.hyper_connection import Site, hc_head, hc_post, hc_post_pre, hc_pre
from whalepod.kernels.linear_cpu import multiply, packed, plain
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.simd import (
    LANES,
    add,
    column_sums,
    div,
    exp,
    fma,
    get,
    load,
    mul,
    put,
    row_largest,
    row_sums,
    splat,
    store,
    store_first,
    sub,
    total,
)

_STREAMS, _MIXES = 4, 24
_BYTES = 4 * LANES
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@compiled
def mean_square(x, count):
    """Mean of the squares of `count` numbers, a multiple of 16: two chains a lane, then a tree."""
    a = b = splat(_ZERO)
    i = 0
    while i + 2 * LANES <= count:
        one, two = load(x + i * 4), load(x + i * 4 + _BYTES)
        a, b = fma(one, one, a), fma(two, two, b)
        i += 2 * LANES
    if i < count:
        one = load(x + i * 4)
        a = fma(one, one, a)
    return total(add(a, b)) / np.float32(count)


@compiled
def _doubly(logits, iters, eps):
    e = exp(sub(logits, row_largest(logits)))
    mix = add(div(e, row_sums(e)), eps)
    mix = div(mix, add(column_sums(mix), eps))
    for _ in range(iters - 1):
        mix = div(mix, add(row_sums(mix), eps))
        mix = div(mix, add(column_sums(mix), eps))
    return mix


@entry("eps", "norm_eps")
def _pre(x, fn, size, base, scales, norm, iters, eps, norm_eps, rows, width, mixes, y, post, comb):
    streams = _STREAMS * width
    multiply(x, streams * 4, fn, size, streams, mixes, _MIXES * 4, rows, _MIXES, 0)
    one, small = splat(_ONE), splat(np.float32(eps))
    for t in range(rows):
        x_t, m, y_t = x + t * streams * 4, mixes + t * _MIXES * 4, y + t * width * 4
        scale = splat(np.float32(1) / np.sqrt(mean_square(x_t, streams) + np.float32(norm_eps)))
        gates = fma(mul(load(m), scale), load(scales), load(base))
        logits = fma(mul(load(m + 32), scale), load(scales + 32), load(base + 32))
        store(comb + t * 64, _doubly(logits, iters, small))
        gates = div(one, add(one, exp(sub(splat(_ZERO), gates))))
        # The row's mixes have been read: its gates may lie there.
        store(m, add(gates, small))
        p0, p1, p2, p3 = splat(get(m)), splat(get(m + 4)), splat(get(m + 8)), splat(get(m + 12))
        store(m, mul(gates, splat(_TWO)))
        store_first(post + t * 16, load(m + 16), 4)
        for d in range(0, width * 4, _BYTES):
            s = mul(p0, load(x_t + d))
            s = fma(p1, load(x_t + width * 4 + d), s)
            s = fma(p2, load(x_t + width * 8 + d), s)
            store(y_t + d, fma(p3, load(x_t + width * 12 + d), s))
        if norm:
            scale = splat(_ONE / np.sqrt(mean_square(y_t, width) + np.float32(norm_eps)))
            for d in range(0, width * 4, _BYTES):
                store(y_t + d, mul(mul(load(y_t + d), scale), load(norm + d)))


@hc_pre.twin("compiled", runs)
def _hc_pre(
    x_TCD: Tensor, site: Site, norm_D: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    fn, base, scales = site.fn, site.base, site.scales
    rows, streams, width = x_TCD.shape
    wanted = (x_TCD, fn, base, scales) if norm_D is None else (x_TCD, fn, base, scales, norm_D)
    if streams != _STREAMS or width % LANES or not plain(*wanted):
        return hc_pre.reference(x_TCD, site, norm_D)
    x, w = x_TCD.contiguous(), packed(fn)
    mixes = torch.empty(rows, _MIXES)
    y, post, comb = torch.empty(rows, width), torch.empty(rows, 4), torch.empty(rows, 4, 4)
    _pre(
        *(x.data_ptr(), w.address, w.size, base.data_ptr(), scales.data_ptr()),
        *(0 if norm_D is None else norm_D.data_ptr(), site.iters, site.eps, site.rms_eps),
        *(rows, width),
        *(mixes.data_ptr(), y.data_ptr(), post.data_ptr(), comb.data_ptr()),
    )
    return y, post, comb


@entry("eps", "norm_eps")
def _head(x, fn, size, base, scales, eps, norm_eps, rows, width, mixes, y):
    """`mixes` has room for 16 numbers beyond those of the rows."""
    streams = _STREAMS * width
    multiply(x, streams * 4, fn, size, streams, mixes, _STREAMS * 4, rows, _STREAMS, 0)
    one, small, room = splat(_ONE), splat(np.float32(eps)), mixes + rows * _STREAMS * 4
    for t in range(rows):
        x_t, y_t = x + t * streams * 4, y + t * width * 4
        scale = _ONE / np.sqrt(mean_square(x_t, streams) + np.float32(norm_eps))
        for k in range(_STREAMS):
            mix = get(mixes + (t * _STREAMS + k) * 4) * scale * get(scales + k * 4)
            put(room + k * 4, mix + get(base + k * 4))
        store(room, add(div(one, add(one, exp(sub(splat(_ZERO), load(room))))), small))
        p0, p1, p2, p3 = (
            splat(get(room)),
            splat(get(room + 4)),
            splat(get(room + 8)),
            splat(get(room + 12)),
        )
        for d in range(0, width * 4, _BYTES):
            s = mul(p0, load(x_t + d))
            s = fma(p1, load(x_t + width * 4 + d), s)
            s = fma(p2, load(x_t + width * 8 + d), s)
            store(y_t + d, fma(p3, load(x_t + width * 12 + d), s))


@hc_head.twin("compiled", runs)
def _hc_head(x_TCD: Tensor, site: Site, norm_D: Tensor | None = None) -> Tensor:
    fn, base, scales = site.fn, site.base, site.scales
    rows, streams, width = x_TCD.shape
    if streams != _STREAMS or width % LANES or not plain(x_TCD, fn, base, scales):
        return hc_head.reference(x_TCD, site, norm_D)
    x, w = x_TCD.contiguous(), packed(fn)
    mixes, y = torch.zeros(rows * _STREAMS + LANES), torch.empty(rows, width)
    _head(
        *(x.data_ptr(), w.address, w.size, base.data_ptr(), scales.data_ptr()),
        *(site.eps, site.rms_eps, rows, width, mixes.data_ptr(), y.data_ptr()),
    )
    return y if norm_D is None else rms_norm(y, norm_D, site.rms_eps)


@entry()
def _post(f, more, x, post, comb, rows, width, y):
    for t in range(rows):
        f_t, more_t, p = f + t * width * 4, more + t * width * 4, post + t * 16
        for k in range(_STREAMS):
            x_t, c = x + t * width * 16, comb + t * 64 + k * 4
            y_t = y + (t * _STREAMS + k) * width * 4
            own = splat(get(p + k * 4))
            c0, c1, c2, c3 = (
                splat(get(c)),
                splat(get(c + 16)),
                splat(get(c + 32)),
                splat(get(c + 48)),
            )
            for d in range(0, width * 4, _BYTES):
                s = load(f_t + d)
                if more:
                    s = add(s, load(more_t + d))
                s = fma(c0, load(x_t + d), mul(own, s))
                s = fma(c1, load(x_t + width * 4 + d), s)
                s = fma(c2, load(x_t + width * 8 + d), s)
                store(y_t + d, fma(c3, load(x_t + width * 12 + d), s))


@hc_post.twin("compiled", runs)
def _hc_post(
    f_TD: Tensor, x_TCD: Tensor, post_TC: Tensor, comb_TCC: Tensor, more_TD: Tensor | None = None
) -> Tensor:
    rows, streams, width = x_TCD.shape
    f_TD = combine(f_TD) if f_TD.dim() == 3 else f_TD
    wanted = (f_TD, x_TCD, post_TC, comb_TCC)
    more = () if more_TD is None else (more_TD,)
    if streams != _STREAMS or width % LANES or not plain(*wanted, *more):
        return hc_post.reference(*wanted, more_TD)
    f, x, post, comb = (t.contiguous() for t in wanted)
    added = None if more_TD is None else more_TD.contiguous()
    y = torch.empty_like(x)
    _post(
        *(f.data_ptr(), 0 if added is None else added.data_ptr(), x.data_ptr()),
        *(post.data_ptr(), comb.data_ptr(), rows, width, y.data_ptr()),
    )
    return y


@hc_post_pre.twin("compiled", runs)
def _hc_post_pre(
    f_TD: Tensor,
    x_TCD: Tensor,
    post_TC: Tensor,
    comb_TCC: Tensor,
    site: Site,
    norm_D: Tensor | None = None,
    more_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_TCD = _hc_post(f_TD, x_TCD, post_TC, comb_TCC, more_TD)
    return x_TCD, *_hc_pre(x_TCD, site, norm_D)
