"""Triton source of products of very many rows with FP8 matrices: widened once, not in every tile.

A row's sum is the one of `dense_triton.py`: blocks of 16 columns in order within a chunk, chunks in
order, weights the first operand of the product.
"""

from __future__ import annotations

from whalepod.kernels.dense_triton import widen_words
from whalepod.kernels.jit import jit, tl
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin


@jit
def widen_kernel(
    w, ws, wide, N: tl.constexpr, BLOCKS: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Codes `[G, B, N, 64]` to values `[G * N, B * 128]`: one block of columns of BN rows."""
    begin(EARLY)
    TALL: tl.constexpr = (N + 127) // 128
    b, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 64)
    kept = (n < N)[:, None]
    at = ((group * BLOCKS + b) * N + n)[:, None] * 64 + j[None, :]
    words = tl.load(w + at, mask=kept, other=0)
    scale = tl.load(ws + (group * BLOCKS + b) * TALL + n // 128, mask=n < N, other=1.0)
    low, high = widen_words(words, scale * 2.0**120, EXACT)
    to = wide + (group * N + n)[:, None] * (BLOCKS * 128) + b * 128 + j[None, :]
    tl.store(to, rounded(low, wide.dtype.element_ty, EXACT), mask=kept)
    tl.store(to + 64, rounded(high, wide.dtype.element_ty, EXACT), mask=kept)


@jit
def wide_kernel(
    x, w, out, M, N: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    CHUNK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """One tile of `[M, GROUPS * N]`; `x` `[M, GROUPS * K]` and `w` `[GROUPS * N, K]` are descriptors."""
    begin(EARLY)
    deep, tall = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Eight tiles of rows with one of outputs after the other: what they read stays in the cache.
    first = tl.program_id(0) // (8 * tall) * 8
    high = tl.minimum(deep - first, 8)
    place = tl.program_id(0) % (8 * tall)
    m, n = (first + place % high) * BM, place // high * BN
    group = tl.program_id(1)
    K: tl.constexpr = BLOCKS * 128
    total = tl.zeros((BN, BM), tl.float32)
    if CHUNK >= BLOCKS:
        for k in range(0, K, BK):
            total = _step(total, x, w, m, n, k, group, N, K, EXACT)
    else:
        for start in range(0, K, CHUNK * 128):
            acc = tl.zeros((BN, BM), tl.float32)
            for k in range(start, tl.minimum(start + CHUNK * 128, K), BK):
                acc = _step(acc, x, w, m, n, k, group, N, K, EXACT)
            total += acc
    row, column = m + tl.arange(0, BM), n + tl.arange(0, BN)
    at = out + row.to(tl.int64)[None, :] * (GROUPS * N) + (group * N + column)[:, None]
    kept = (row < M)[None, :] & (column < N)[:, None]
    tl.store(at, rounded(total, out.dtype.element_ty, EXACT), mask=kept)


@jit
def _step(
    acc, x, w, m, n, k, group, N: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    weights, inputs = w.load([group * N + n, k]), x.load([m, group * K + k])
    if EXACT:
        weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
    return tl.dot(weights, inputs.T, acc, input_precision="ieee")
