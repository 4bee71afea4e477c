"""Triton source of `sample`: quantiles by bisection instead of a sort.

Four launches. `scan` finds the best logit of each slice of a row; `weigh` weighs the candidates of each
slice; `choose` finds the slice and in it the token that the number falls on. Where top-k or top-p filter,
`weigh` also tells candidates by steps from the best one, `collect` copies those that may be kept, and
`choose` bisects among them for the k-th one and for top-p's last. Weights are whole numbers, so their sums
are exact in any order, and a row's token does not depend on the other rows.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, tl, triton
from whalepod.kernels.quantile_triton import quantile

# Elements of a slice; candidates held in registers; rows at once, which bounds the memory they take.
SLICE, TILE, ROWS = 4096, 4096, 64
WARPS, SLICE_WARPS = 8, 8
_BUCKETS = 8


@jit
def _scaled(
    logits, n, part, best, settings, V: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """One slice: logits, ids, weights, buckets by distance from the best, and what is a candidate."""
    s = tl.arange(0, SP)
    top = tl.max(tl.load(best + n * S + s, mask=s < S, other=float("-inf")))
    v = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + n * V + v, mask=v < V, other=float("-inf"))
    factor = 1.0 / tl.load(settings + n * 5)
    scaled, most = x.to(tl.float64) * factor, top.to(tl.float64) * factor
    exact = most - scaled
    below = exact.to(tl.float32)
    near = tl.exp(-below)  # then what the rounding of the argument left out
    finite = tl.minimum(exact, 1e4)
    near -= near * (finite - finite.to(tl.float32).to(tl.float64)).to(tl.float32)
    weight = (near * BEST).to(tl.int64)
    bucket = (below >= 1.0).to(tl.int32) + (below >= 2.0).to(tl.int32)
    bucket += (below >= 3.5).to(tl.int32) + (below >= 5.0).to(tl.int32)
    bucket += (below >= 7.0).to(tl.int32) + (below >= 10.0).to(tl.int32)
    bucket += (below >= 15.0).to(tl.int32)
    return x, v, weight, bucket, (v < V) & (scaled >= most + tl.load(settings + n * 5 + 3))


@jit
def scan_kernel(logits, best, where, total, V: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr):
    """Largest logit of a slice, its lowest id, and the sum of exponentials over it."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + n * V + v, mask=v < V, other=float("-inf"))
    top = tl.max(x)
    tl.store(best + n * S + part, top)
    tl.store(where + n * S + part, tl.min(tl.where(x == top, v, V)))
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(total + n * S + part, tl.sum(tl.exp(x - safe)))


@jit
def _filtered(settings, n):
    """Whether top-k or top-p may keep some candidates and not others."""
    return (tl.load(settings + n * 5 + 1) > 0) | (tl.load(settings + n * 5 + 2) < 1.0)


@jit
def weigh_kernel(
    logits, best, settings, counts, masses, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Weight of a slice's candidates; if the row is filtered by their distance from the best, and counted."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + n * 5) > 0:
        _, _, weight, bucket, real = _scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
        at = (n * S + part) * BUCKETS
        if _filtered(settings, n):
            bucket = tl.where(real, bucket, BUCKETS)
            for b in range(BUCKETS):
                tl.store(counts + at + b, tl.sum((bucket == b).to(tl.int32)))
                tl.store(masses + at + b, tl.sum(tl.where(bucket == b, weight, 0)))
        else:
            tl.store(masses + at, tl.sum(tl.where(real, weight, 0)))


@jit
def _needed(share, total):
    """Smallest whole weight that is at least this share of the total, and at least one."""
    need = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(need, 1), total)


@jit
def _drawn(uniform, total):
    """Smallest whole weight above this share of the total."""
    return tl.minimum(tl.floor(uniform * total.to(tl.float64)).to(tl.int64) + 1, total)


@jit
def _bracket(counts, masses, settings, n, S: tl.constexpr, SP: tl.constexpr, BUCKETS: tl.constexpr):
    """Last bucket to look at, how many lie in it and above, weight of all, whether k limits."""
    s, b = tl.arange(0, SP), tl.arange(0, BUCKETS)
    at = (n * S + s)[:, None] * BUCKETS + b[None, :]
    count = tl.sum(tl.load(counts + at, mask=(s < S)[:, None], other=0), 0)
    mass = tl.sum(tl.load(masses + at, mask=(s < S)[:, None], other=0), 0)
    total, kept = tl.sum(mass), tl.sum(count)
    k, p = tl.load(settings + n * 5 + 1).to(tl.int32), tl.load(settings + n * 5 + 2)
    limited = (k > 0) & (k < kept)
    at_k = tl.sum((tl.cumsum(count, 0) < k).to(tl.int32))
    at_p = tl.sum((tl.cumsum(mass, 0) < _needed(p, total)).to(tl.int32))
    last = tl.where(limited, at_k, tl.where(p < 1.0, at_p, BUCKETS))
    return last, tl.sum(tl.where(b <= last, count, 0)), total, limited


@jit
def collect_kernel(
    logits, best, settings, counts, masses, keys, weights, ids, V: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Copy the candidates of a filtered row that may be kept, in the order of their ids."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(settings + n * 5) > 0) & _filtered(settings, n):
        last, _, _, _ = _bracket(counts, masses, settings, n, S, SP, BUCKETS)
        x, v, weight, bucket, real = _scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
        s, b = tl.arange(0, SP), tl.arange(0, BUCKETS)
        before = (s < part)[:, None] & (b <= last)[None, :]
        found = tl.load(counts + (n * S + s)[:, None] * BUCKETS + b[None, :], mask=before, other=0)
        taken = real & (bucket <= last)
        at = n * V + tl.sum(found) + tl.cumsum(taken.to(tl.int32), 0) - 1
        bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
        tl.store(keys + at, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=taken)
        tl.store(weights + at, weight, mask=taken)
        tl.store(ids + at, v, mask=taken)


@jit
def _plain_token(
    logits, best, settings, masses, n, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """The token that the number falls on, all candidates one after the other by id."""
    s = tl.arange(0, SP)
    mass = tl.load(masses + (n * S + s) * BUCKETS, mask=s < S, other=0)
    ends = tl.cumsum(mass, 0)
    need = _drawn(tl.load(settings + n * 5 + 4), tl.sum(mass))
    part = tl.sum((ends < need).to(tl.int32))
    need -= tl.sum(tl.where(s < part, mass, 0))
    _, _, weight, _, real = _scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
    ends = tl.cumsum(tl.where(real, weight, 0), 0)
    return part * SLICE + tl.sum((ends < need).to(tl.int32))


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
def _filtered_token(
    settings, counts, masses, keys, weights, ids, top, n, S: tl.constexpr, SP: tl.constexpr,
    BUCKETS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token that the number falls on among those that the filters keep, by id."""
    _last, length, total, limited = _bracket(counts, masses, settings, n, S, SP, BUCKETS)
    i = tl.arange(0, TILE)
    key = tl.load(keys + i, mask=i < length, other=-(2**31))
    weight = tl.load(weights + i, mask=i < length, other=0)
    low = tl.full((), 2**31 - 1, tl.int64)
    for start in tl.range(0, length, TILE, loop_unroll_factor=2):
        near = tl.load(keys + start + i, mask=start + i < length, other=2**31 - 1)
        low = tl.minimum(low, tl.min(near).to(tl.int64))
    bits = (top + 0.0).to(tl.int32, bitcast=True)
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 1
    rank = tl.full((), 2**31 - 1, tl.int64)  # without a filter every tie is kept
    if limited:
        k = tl.load(settings + n * 5 + 1).to(tl.int64)
        low, rank, total = quantile(k, low, high, key, weight, keys, weights, length, True, TILE)
    p = tl.load(settings + n * 5 + 2)
    if p < 1.0:
        need = _needed(p, total)
        low, rank, total = quantile(
            need, low, high, key, weight, keys, weights, length, False, TILE
        )
    need = _drawn(tl.load(settings + n * 5 + 4), total)
    ties, before, place = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64), length
    for start in range(0, length, TILE):
        weight, ties = _kept(start, i, length, low, rank, ties, keys, weights)
        ends = before + tl.cumsum(weight, 0)
        reached = (ends >= need) & (start + i < length)
        place = tl.minimum(place, tl.min(tl.where(reached, start + i, length)))
        before += tl.sum(weight)
    return tl.load(ids + place)


@jit
def choose_kernel(
    logits, settings, best, where, totals, counts, masses, keys, weights, ids, tokens, logprobs,
    V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr,
    BUCKETS: tl.constexpr, TILE: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """One row's token and its log-probability; without FILTERED no row has top-k or top-p."""
    n, s = tl.program_id(0).to(tl.int64), tl.arange(0, SP)
    tops = tl.load(best + n * S + s, mask=s < S, other=float("-inf"))
    top = tl.max(tops)
    sums = tl.load(totals + n * S + s, mask=s < S, other=0.0) * tl.exp(tops - top)
    token = tl.min(tl.where(tops == top, tl.load(where + n * S + s, mask=s < S, other=V), V))
    if tl.load(settings + n * 5) > 0:
        if FILTERED:
            if _filtered(settings, n):
                token = _filtered_token(
                    settings, counts, masses, keys + n * V, weights + n * V, ids + n * V, top, n, S,
                    SP, BUCKETS, TILE,
                )  # fmt: skip
            else:
                token = _plain_token(
                    logits, best, settings, masses, n, V, S, SP, SLICE, BEST, BUCKETS
                )
        else:
            token = _plain_token(logits, best, settings, masses, n, V, S, SP, SLICE, BEST, BUCKETS)
    tl.store(tokens + n, token.to(tl.int64))
    tl.store(logprobs + n, tl.load(logits + n * V + token) - (top + tl.log(tl.sum(sums))))


def sample(logits_NV: Tensor, settings_N5: Tensor, filtered: bool = True) -> tuple[Tensor, Tensor]:
    """Twin of `kernels.sample.sample`."""
    count, size = logits_NV.shape
    logits, settings = logits_NV.contiguous(), settings_N5.contiguous()
    slices = triton.cdiv(size, SLICE)

    def new(kind: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=kind, device=logits.device)

    tokens, logprobs = new(torch.int64, count), new(torch.float32, count)
    best, totals = new(torch.float32, count, slices), new(torch.float32, count, slices)
    where, tally = new(torch.int32, count, slices), new(torch.int32, count, slices, _BUCKETS)
    masses = new(torch.int64, count, slices, _BUCKETS)
    bounds = {"V": size, "S": slices, "SLICE": SLICE}
    scale = {"SP": max(2, triton.next_power_of_2(slices)), "BEST": 2.0 ** (62 - size.bit_length())}
    rest = {**bounds, **scale, "BUCKETS": _BUCKETS}
    if count:
        scan_kernel[count, slices](logits, best, where, totals, **bounds)
        weigh_kernel[count, slices](
            logits, best, settings, tally, masses, **rest, num_warps=SLICE_WARPS
        )
    for first in range(0, count, ROWS if filtered else max(1, count)):
        some = slice(first, first + ROWS if filtered else count)
        rows = logits[some], settings[some]
        seen = best[some], where[some], totals[some], tally[some], masses[some]
        held = (len(rows[0]), size) if filtered else (1, 1)
        found = new(torch.int32, *held), new(torch.int64, *held), new(torch.int32, *held)
        if filtered:
            collect_kernel[len(rows[0]), slices](
                rows[0], seen[0], rows[1], *seen[3:], *found, **rest, num_warps=SLICE_WARPS
            )
        choose_kernel[(len(rows[0]),)](
            *rows, *seen, *found, tokens[some], logprobs[some], **rest, FILTERED=filtered,
            TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
    return tokens, logprobs
