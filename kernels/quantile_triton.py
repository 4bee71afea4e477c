"""Thresholds by bisection, three counts a turn: quantiles of weighted candidates, for `sample_triton`.

Candidates are keys, int32, whose order is that of their logits, and whole weights: sums are exact.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from whalepod.kernels.jit import jit, tl


@jit
def key_of(x):
    """A whole number for each fp32 one, in their order; -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def between(low, high):
    """Three keys that cut `low .. high` in four."""
    step = tl.maximum((high - low) // 4, 1)
    return low + step, low + 2 * step, low + 3 * step


@jit
def closer(need, low, high, a, b, c, from_a, from_b, from_c):
    """The part of `low .. high` where `need` is reached, given what is reached from each of three keys on."""
    low = tl.where(from_c >= need, c, tl.where(from_b >= need, b, tl.where(from_a >= need, a, low)))
    bound = tl.where(from_b >= need, c, tl.where(from_a >= need, b, a))
    return low, tl.minimum(high, tl.where(from_c >= need, high, bound))


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
def quantile(need, low, high, key, weight, keys, weights, length, COUNT: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    """Largest key such that it and what is above reaches `need`; how many of its ties that takes.

    From `low` on it is reached, from `high` on not. Also returns the weight that is taken then.
    """
    while high - low > 1:
        a, b, c = between(low, high)
        from_a, from_b, from_c = _from(a, b, c, key, weight, keys, weights, length, COUNT, TILE)
        low, high = closer(need, low, high, a, b, c, from_a, from_b, from_c)
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
