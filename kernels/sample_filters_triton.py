"""Top-k and top-p of `sample_triton`: which candidates they keep, and the token among these.

A row's candidates are told by bins of an eighth of a step from the best one, and weighed by buckets of bins.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from whalepod.kernels.jit import jit, tl
from whalepod.kernels.quantile_triton import key_of, quantile


@jit
def filters(settings, n):
    """Whether top-k or top-p may keep some candidates and not others."""
    return (tl.load(settings + n * 5 + 1) > 0) | (tl.load(settings + n * 5 + 2) < 1.0)


@jit
def bucket_of(bin):
    """Buckets begin at bins 0, 8, 16, 28, 40, 56, 80 and 120."""
    bucket = (bin >= 8).to(tl.int32) + (bin >= 16).to(tl.int32) + (bin >= 28).to(tl.int32)
    bucket += (bin >= 40).to(tl.int32) + (bin >= 56).to(tl.int32)
    return bucket + (bin >= 80).to(tl.int32) + (bin >= 120).to(tl.int32)


@jit
def needed(share, total):
    """Smallest whole weight that is at least this share of the total, and at least one."""
    need = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(need, 1), total)


@jit
def drawn(uniform, total):
    """Smallest whole weight above this share of the total."""
    return tl.minimum(tl.floor(uniform * total.to(tl.float64)).to(tl.int64) + 1, total)


@jit
def bracket_kernel(
    settings, counts, masses, starts, brackets, totals, S: tl.constexpr, SP: tl.constexpr,
    BUCKETS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Of a filtered row: up to which bin candidates may be kept, where those of each slice go, their weight.

    Writes to `brackets` `[N, 3]`: the last bin, how many candidates lie in it and above, whether k limits.
    """
    n = tl.program_id(0).to(tl.int64)
    if (tl.load(settings + n * 5) > 0) & filters(settings, n):
        s, b, bins = tl.arange(0, SP), tl.arange(0, BUCKETS), tl.arange(0, BINS)
        some = (s < S)[:, None]
        count = tl.load(counts + (n * S + s)[:, None] * BINS + bins[None, :], mask=some, other=0)
        mass = tl.load(masses + (n * S + s)[:, None] * BUCKETS + b[None, :], mask=some, other=0)
        mass, heads = tl.sum(mass, 0), tl.cumsum(tl.sum(count, 0), 0)
        total = tl.sum(mass)
        k, p = tl.load(settings + n * 5 + 1).to(tl.int32), tl.load(settings + n * 5 + 2)
        limited = (k > 0) & (k < tl.max(heads))
        at_k = tl.sum((heads < k).to(tl.int32))
        at_p = tl.sum((tl.cumsum(mass, 0) < needed(p, total)).to(tl.int32))
        of_p = tl.max(tl.where(bucket_of(bins) <= at_p, bins, 0))
        last = tl.where(limited, at_k, tl.where(p < 1.0, of_p, BINS - 1))
        of_slice = tl.sum(tl.where((bins <= last)[None, :], count, 0), 1)
        ends = tl.cumsum(of_slice, 0)
        tl.store(starts + n * (S + 1) + s, ends - of_slice, mask=s < S)
        tl.store(starts + n * (S + 1) + S, tl.max(ends))
        tl.store(brackets + n * 3, last)
        tl.store(brackets + n * 3 + 1, tl.max(ends))
        tl.store(brackets + n * 3 + 2, limited.to(tl.int32))
        tl.store(totals + n, total)


@jit
def _kept(start, i, length, low, rank, ties, keys, weights):
    """Weights of a tile's candidates that are kept, and how many ties of the last key are seen with it."""
    j = start + i
    key = tl.load(keys + j, mask=j < length, other=-(2**31))
    tie = (key == low.to(tl.int32)) & (j < length)
    order = ties + tl.cumsum(tie.to(tl.int32), 0)
    keep = ((key > low.to(tl.int32)) & (j < length)) | (tie & (order <= rank))
    weight = tl.load(weights + j, mask=keep, other=0)
    return weight, ties + tl.sum(tie.to(tl.int32))


@jit
def kept_token(
    settings, limited, length, total, keys, weights, ids, top, n, TILE: tl.constexpr
):  # fmt: skip
    """The token that the number falls on among those that the filters keep, by id."""
    i = tl.arange(0, TILE)
    key = tl.load(keys + i, mask=i < length, other=-(2**31))
    weight = tl.load(weights + i, mask=i < length, other=0)
    low = tl.full((), 2**31 - 1, tl.int64)
    for start in tl.range(0, length, TILE, loop_unroll_factor=2):
        near = tl.load(keys + start + i, mask=start + i < length, other=2**31 - 1)
        low = tl.minimum(low, tl.min(near).to(tl.int64))
    high = key_of(top).to(tl.int64) + 1
    rank = tl.full((), 2**31 - 1, tl.int64)  # without a filter every tie is kept
    if limited:
        k = tl.load(settings + n * 5 + 1).to(tl.int64)
        low, rank, total = quantile(k, low, high, key, weight, keys, weights, length, True, TILE)
    p = tl.load(settings + n * 5 + 2)
    if p < 1.0:
        need = needed(p, total)
        low, rank, total = quantile(
            need, low, high, key, weight, keys, weights, length, False, TILE
        )
    need = drawn(tl.load(settings + n * 5 + 4), total)
    ties, before, place = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64), length
    for start in range(0, length, TILE):
        weight, ties = _kept(start, i, length, low, rank, ties, keys, weights)
        ends = before + tl.cumsum(weight, 0)
        reached = (ends >= need) & (start + i < length)
        place = tl.minimum(place, tl.min(tl.where(reached, start + i, length)))
        before += tl.sum(weight)
    return tl.load(ids + place)
