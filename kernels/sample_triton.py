"""Triton source of `sample`: quantiles by bisection instead of a sort.

Four launches. `scan` finds the best logit of each slice of a row; `weigh` counts and weighs what
lies within steps of the best one; `collect` copies the candidates that the filters need looked at;
`choose` bisects among them for the k-th one, for top-p's last and for the drawn one. Weights are whole
numbers, so their sums are exact in any order, and a row's token does not depend on the other rows.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, tl, triton

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
def weigh_kernel(
    logits, best, settings, counts, masses, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Candidates of a slice by their distance from the best, and their weights."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + n * 5) > 0:
        _, _, weight, bucket, real = _scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
        bucket = tl.where(real, bucket, BUCKETS)
        at = (n * S + part) * BUCKETS
        for b in range(BUCKETS):
            tl.store(counts + at + b, tl.sum((bucket == b).to(tl.int32)))
            tl.store(masses + at + b, tl.sum(tl.where(bucket == b, weight, 0)))


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
    """First and last bucket to look at, weight above them, how many lie in them, whether k limits."""
    s, b = tl.arange(0, SP), tl.arange(0, BUCKETS)
    at = (n * S + s)[:, None] * BUCKETS + b[None, :]
    count = tl.sum(tl.load(counts + at, mask=(s < S)[:, None], other=0), 0)
    mass = tl.sum(tl.load(masses + at, mask=(s < S)[:, None], other=0), 0)
    total, kept = tl.sum(mass), tl.sum(count)
    k = tl.load(settings + n * 5 + 1).to(tl.int32)
    p, u = tl.load(settings + n * 5 + 2), tl.load(settings + n * 5 + 4)
    limited = (k > 0) & (k < kept)
    heads, weights = tl.cumsum(count, 0), tl.cumsum(mass, 0)
    at_k = tl.sum((heads < k).to(tl.int32))
    at_p = tl.sum((weights < _needed(p, total)).to(tl.int32))
    at_u = tl.sum((weights < _drawn(u, total)).to(tl.int32))
    whole = limited | (p < 1.0)
    last = tl.where(limited, at_k, tl.where(p < 1.0, at_p, at_u))
    first = tl.where(whole, 0, at_u)
    inside = (b >= first) & (b <= last)
    above = tl.sum(tl.where(b < first, mass, 0))
    return first, last, above, tl.sum(tl.where(inside, count, 0)), total, limited


@jit
def collect_kernel(
    logits, best, settings, counts, masses, keys, weights, ids, V: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, SLICE: tl.constexpr, BEST: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Copy the candidates to look at, in the order of their ids."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + n * 5) > 0:
        first, last, _, _, _, _ = _bracket(counts, masses, settings, n, S, SP, BUCKETS)
        x, v, weight, bucket, real = _scaled(logits, n, part, best, settings, V, SLICE, BEST, S, SP)
        s, b = tl.arange(0, SP), tl.arange(0, BUCKETS)
        before = (s < part)[:, None] & ((b >= first) & (b <= last))[None, :]
        found = tl.load(counts + (n * S + s)[:, None] * BUCKETS + b[None, :], mask=before, other=0)
        taken = real & (bucket >= first) & (bucket <= last)
        at = n * V + tl.sum(found) + tl.cumsum(taken.to(tl.int32), 0) - 1
        bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
        tl.store(keys + at, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=taken)
        tl.store(weights + at, weight, mask=taken)
        tl.store(ids + at, v, mask=taken)


@jit
def _added(key, weight, mid, COUNT: tl.constexpr):
    return tl.where(key >= mid.to(tl.int32), 1 if COUNT else weight, 0).to(tl.int64)


@jit
def _from(a, b, c, key, weight, keys, weights, length, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Weight (or number) of the candidates from each of three keys on; one tile is in registers."""
    in_a, in_b = _added(key, weight, a, COUNT), _added(key, weight, b, COUNT)
    in_c = _added(key, weight, c, COUNT)
    for start in tl.range(TILE, length, TILE, loop_unroll_factor=2):
        i = start + tl.arange(0, TILE)
        key = tl.load(keys + i, mask=i < length, other=-(2**31))
        if not COUNT:
            weight = tl.load(weights + i, mask=i < length, other=0)
        in_a += _added(key, weight, a, COUNT)
        in_b += _added(key, weight, b, COUNT)
        in_c += _added(key, weight, c, COUNT)
    return tl.sum(in_a), tl.sum(in_b), tl.sum(in_c)


@jit
def _quantile(need, low, high, key, weight, keys, weights, length, COUNT: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    """Largest key such that it and what is above reaches `need`; how many of its ties that takes.

    From `low` on it is reached, from `high` on not. Also returns the weight that is taken then.
    """
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        a, b, c = low + step, low + 2 * step, low + 3 * step
        from_a, from_b, from_c = _from(a, b, c, key, weight, keys, weights, length, COUNT, TILE)
        low = tl.where(
            from_c >= need, c, tl.where(from_b >= need, b, tl.where(from_a >= need, a, low))
        )
        bound = tl.where(from_b >= need, c, tl.where(from_a >= need, b, a))
        high = tl.minimum(high, tl.where(from_c >= need, high, bound))
    numbers, above, _c = _from(
        low, low + 1, low + 1, key, weight, keys, weights, length, True, TILE
    )
    mass, mass_above, _c = _from(
        low, low + 1, low + 1, key, weight, keys, weights, length, False, TILE
    )
    ties = numbers - above
    each = (mass - mass_above) // tl.maximum(ties, 1)
    taken = need - above if COUNT else (need - mass_above + each - 1) // tl.maximum(each, 1)
    return low, taken, mass_above + taken * each


@jit
def choose_kernel(
    logits, settings, best, where, totals, counts, masses, keys, weights, ids, tokens, logprobs,
    V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BUCKETS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row's token and its log-probability."""
    n, s = tl.program_id(0).to(tl.int64), tl.arange(0, SP)
    tops = tl.load(best + n * S + s, mask=s < S, other=float("-inf"))
    top = tl.max(tops)
    sums = tl.load(totals + n * S + s, mask=s < S, other=0.0) * tl.exp(tops - top)
    token = tl.min(tl.where(tops == top, tl.load(where + n * S + s, mask=s < S, other=V), V))
    if tl.load(settings + n * 5) > 0:
        _first, _last, above, length, total, limited = _bracket(
            counts, masses, settings, n, S, SP, BUCKETS
        )
        keys += n * V
        weights += n * V
        i = tl.arange(0, TILE)
        key = tl.load(keys + i, mask=i < length, other=-(2**31))
        weight = tl.load(weights + i, mask=i < length, other=0)
        low = tl.full((), 2**31 - 1, tl.int64)
        for start in tl.range(0, length, TILE, loop_unroll_factor=2):
            near = tl.load(keys + start + i, mask=start + i < length, other=2**31 - 1)
            low = tl.minimum(low, tl.min(near).to(tl.int64))
        bits = (top + 0.0).to(tl.int32, bitcast=True)
        high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 1
        rank = tl.full((), 0, tl.int64)
        if limited:
            k = tl.load(settings + n * 5 + 1).to(tl.int64)
            low, rank, total = _quantile(
                k, low, high, key, weight, keys, weights, length, True, TILE
            )
        p = tl.load(settings + n * 5 + 2)
        if p < 1.0:
            need = _needed(p, total)
            low, rank, total = _quantile(
                need, low, high, key, weight, keys, weights, length, False, TILE
            )
        need = _drawn(tl.load(settings + n * 5 + 4), total) - above
        at, rank, total = _quantile(
            need, low, high, key, weight, keys, weights, length, False, TILE
        )
        seen = tl.full((), 0, tl.int32)
        for start in range(0, length, TILE):
            j = start + i
            same = (tl.load(keys + j, mask=j < length, other=0) == at.to(tl.int32)) & (j < length)
            order = seen + tl.cumsum(same.to(tl.int32), 0)
            hit = same & (order == rank)
            token += tl.sum(tl.where(hit, tl.load(ids + n * V + j, mask=hit, other=0) - token, 0))
            seen += tl.sum(same.to(tl.int32))
    tl.store(tokens + n, token.to(tl.int64))
    tl.store(logprobs + n, tl.load(logits + n * V + token) - (top + tl.log(tl.sum(sums))))


def sample(logits_NV: Tensor, settings_N5: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `kernels.sample.sample`."""
    count = len(logits_NV)
    logits, settings = logits_NV.contiguous(), settings_N5.contiguous()
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
    for first in range(0, count, ROWS):
        some = slice(first, first + ROWS)
        _some(logits[some], settings[some], tokens[some], logprobs[some])
    return tokens, logprobs


def _some(logits: Tensor, settings: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Up to ROWS rows."""
    (count, size), device = logits.shape, logits.device
    slices = triton.cdiv(size, SLICE)
    bounds = {"V": size, "S": slices}
    powers = {"SP": max(2, triton.next_power_of_2(slices)), "BUCKETS": _BUCKETS}
    scale = {"SLICE": SLICE, "BEST": 2.0 ** (62 - size.bit_length())}

    def new(kind: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(count, *shape, dtype=kind, device=device)

    best, totals = new(torch.float32, slices), new(torch.float32, slices)
    where, tally = new(torch.int32, slices), new(torch.int32, slices, _BUCKETS)
    masses = new(torch.int64, slices, _BUCKETS)
    keys, weights, ids = new(torch.int32, size), new(torch.int64, size), new(torch.int32, size)
    grid = (count, slices)
    scan_kernel[grid](logits, best, where, totals, **bounds, SLICE=SLICE)
    weigh_kernel[grid](
        logits, best, settings, tally, masses, **bounds, **powers, **scale, num_warps=SLICE_WARPS
    )
    found = (keys, weights, ids)
    collect_kernel[grid](
        logits,
        best,
        settings,
        tally,
        masses,
        *found,
        **bounds,
        **powers,
        **scale,
        num_warps=SLICE_WARPS,
    )
    choose_kernel[(count,)](
        logits, settings, best, where, totals, tally, masses, *found, tokens, logprobs, **bounds,
        **powers, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
