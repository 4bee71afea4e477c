"""Triton source of `sample`: quantiles by bisection instead of a sort.

`scan` finds the best logit of each slice of a row; `weigh` weighs the candidates of each slice; `choose`
finds the slice and in it the token that the number falls on. Where top-k or top-p filter, `weigh` also tells
candidates by their distance from the best one, `bracket` says how far off they may be kept, `collect` copies
these, and `choose` bisects among them for the k-th one and for top-p's last. Weights are whole numbers, so
their sums are exact in any order, and a row's token does not depend on the other rows.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, tl, triton
from whalepod.kernels.quantile_triton import key_of
from whalepod.kernels.sample_filters_triton import (
    bracket_kernel,
    bucket_of,
    drawn,
    filters,
    kept_token,
)

# Elements of a slice; candidates held in registers, many or few; rows at once, which bounds the memory they take.
SLICE, TILE, FEW, ROWS = 4096, 4096, 512, 64
WARPS, SLICE_WARPS = 8, 8
_BUCKETS, _BINS = 8, 256


@jit
def scaled(
    logits, n, part, best, settings, V: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """One slice: logits, ids, weights, bins by distance from the best, and what is a candidate."""
    s = tl.arange(0, SP)
    top = tl.max(tl.load(best + n * S + s, mask=s < S, other=float("-inf")))
    v = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + n * V + v, mask=v < V, other=float("-inf"))
    factor = 1.0 / tl.load(settings + n * 5)
    z, most = x.to(tl.float64) * factor, top.to(tl.float64) * factor
    exact = most - z
    below = exact.to(tl.float32)
    near = tl.exp(-below)  # then what the rounding of the argument left out
    finite = tl.minimum(exact, 1e4)
    near -= near * (finite - finite.to(tl.float32).to(tl.float64)).to(tl.float32)
    weight = (near * BEST).to(tl.int64)
    bin = tl.minimum(below * 8.0, 255.0).to(tl.int32)
    return x, v, weight, bin, (v < V) & (z >= most + tl.load(settings + n * 5 + 3))


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
def best_of(best, where, sums, n, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """A row's best token, the first among equals, its logit, and the sum of exponentials below it."""
    s = tl.arange(0, SP)
    tops = tl.load(best + n * S + s, mask=s < S, other=float("-inf"))
    top = tl.max(tops)
    norm = tl.sum(tl.load(sums + n * S + s, mask=s < S, other=0.0) * tl.exp(tops - top))
    token = tl.min(tl.where(tops == top, tl.load(where + n * S + s, mask=s < S, other=V), V))
    return token, top, norm


@jit
def weigh_kernel(
    logits, best, settings, counts, masses, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Weight of a slice's candidates; if the row is filtered, of those in each bucket, and counts by bins."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + n * 5) > 0:
        _, _, weight, bin, real = scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
        at = (n * S + part) * BUCKETS
        if filters(settings, n):
            bucket = tl.where(real, bucket_of(bin), BUCKETS)
            for b in range(BUCKETS):
                tl.store(masses + at + b, tl.sum(tl.where(bucket == b, weight, 0)))
            found = tl.histogram(bin, BINS, mask=real)
            tl.store(counts + (n * S + part) * BINS + tl.arange(0, BINS), found)
        else:
            tl.store(masses + at, tl.sum(tl.where(real, weight, 0)))


@jit
def _plain_token(
    logits, best, settings, masses, n, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """The token that the number falls on, all candidates one after the other by id."""
    s = tl.arange(0, SP)
    mass = tl.load(masses + (n * S + s) * BUCKETS, mask=s < S, other=0)
    ends = tl.cumsum(mass, 0)
    need = drawn(tl.load(settings + n * 5 + 4), tl.sum(mass))
    part = tl.sum((ends < need).to(tl.int32))
    need -= tl.sum(tl.where(s < part, mass, 0))
    _, _, weight, _, real = scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
    ends = tl.cumsum(tl.where(real, weight, 0), 0)
    return part * SLICE + tl.sum((ends < need).to(tl.int32))


@jit
def collect_kernel(
    logits, best, settings, starts, brackets, keys, weights, ids, V: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Copy the candidates of a filtered row that may be kept, in the order of their ids."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(settings + n * 5) > 0) & filters(settings, n):
        start, stop = tl.load(starts + n * (S + 1) + part), tl.load(starts + n * (S + 1) + part + 1)
        if start < stop:
            x, v, weight, bin, real = scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
            taken = real & (bin <= tl.load(brackets + n * 3))
            at = n * V + start + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(keys + at, key_of(x), mask=taken)
            tl.store(weights + at, weight, mask=taken)
            tl.store(ids + at, v, mask=taken)


@jit
def choose_kernel(
    logits, settings, best, where, sums, masses, brackets, totals, keys, weights, ids, tokens,
    logprobs, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SLICE: tl.constexpr,
    BEST: tl.constexpr, BUCKETS: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
    FILTERED: tl.constexpr,
):  # fmt: skip
    """One row's token and its log-probability; without FILTERED no row has top-k or top-p."""
    n = tl.program_id(0).to(tl.int64)
    token, top, norm = best_of(best, where, sums, n, V, S, SP)
    if tl.load(settings + n * 5) > 0:
        if FILTERED:
            if filters(settings, n):
                length, total = tl.load(brackets + n * 3 + 1), tl.load(totals + n)
                limited = tl.load(brackets + n * 3 + 2) != 0
                found = keys + n * V, weights + n * V, ids + n * V
                if length <= FEW:
                    token = kept_token(settings, limited, length, total, *found, top, n, FEW)
                else:
                    token = kept_token(settings, limited, length, total, *found, top, n, TILE)
            else:
                token = _plain_token(
                    logits, best, settings, masses, n, V, S, SP, SLICE, BEST, BUCKETS
                )
        else:
            token = _plain_token(logits, best, settings, masses, n, V, S, SP, SLICE, BEST, BUCKETS)
    token = tl.minimum(tl.maximum(token, 0), V - 1)  # among logits that are not finite, any
    tl.store(tokens + n, token.to(tl.int64))
    tl.store(logprobs + n, tl.load(logits + n * V + token) - (top + tl.log(norm)))


def sample(logits_NV: Tensor, settings_N5: Tensor, filtered: bool = True) -> tuple[Tensor, Tensor]:
    """Twin of `kernels.sample.sample`."""
    count, size = logits_NV.shape
    logits, settings = logits_NV.contiguous(), settings_N5.contiguous()
    slices, some = triton.cdiv(size, SLICE), count if filtered else 0

    def new(kind: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=kind, device=logits.device)

    tokens, logprobs = new(torch.int64, count), new(torch.float32, count)
    if not count:
        return tokens, logprobs
    best, sums = new(torch.float32, count, slices), new(torch.float32, count, slices)
    where, masses = new(torch.int32, count, slices), new(torch.int64, count, slices, _BUCKETS)
    counts, starts = new(torch.int32, some, slices, _BINS), new(torch.int32, some, slices + 1)
    brackets, totals = new(torch.int32, some, 3), new(torch.int64, some)
    whole = {"S": slices, "SP": max(2, triton.next_power_of_2(slices))}
    each = {"V": size, **whole, "SLICE": SLICE, "BEST": 2.0 ** (62 - size.bit_length())}
    rest = {"BUCKETS": _BUCKETS, "BINS": _BINS, "num_warps": SLICE_WARPS}
    grid = count, slices
    scan_kernel[grid](logits, best, where, sums, size, slices, SLICE)
    weigh_kernel[grid](logits, best, settings, counts, masses, **each, **rest)
    if filtered:
        bracket_kernel[(count,)](
            settings, counts, masses, starts, brackets, totals, **whole, **rest
        )
    step = ROWS if filtered else count
    for first in range(0, count, step):
        own = slice(first, first + step)
        rows, held = len(tokens[own]), size if filtered else 1
        kinds = torch.int32, torch.int64, torch.int32
        found = [new(kind, rows, held) for kind in kinds]
        if filtered:
            collect_kernel[rows, slices](
                logits[own], best[own], settings[own], starts[own], brackets[own], *found, **each,
                num_warps=SLICE_WARPS,
            )  # fmt: skip
        choose_kernel[(rows,)](
            logits[own], settings[own], best[own], where[own], sums[own], masses[own], brackets[own],
            totals[own], *found, tokens[own], logprobs[own], **each, BUCKETS=_BUCKETS,
            FILTERED=filtered, TILE=TILE, FEW=FEW, num_warps=WARPS,
        )  # fmt: skip
    return tokens, logprobs
