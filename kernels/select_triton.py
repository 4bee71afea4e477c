"""Exact top-k on GPUs: the threshold first, then places in order.

Scores become integers that sort alike. A row of few is one program's, which finds the threshold by bisection.
Many are cut in blocks, and the threshold is found by radix: each pass counts one digit of those that agree with the
threshold so far; the last pass knows how many exceed it before each block and how many equals it
may take, so every block writes its own picks in order. Counts are integers: no sum depends on the
order of blocks.

Legend: R rows, E scores of a row, B blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.quantile_triton import between, closer, key_of
from whalepod.kernels.select import select

# Bits of a digit, least significant last, and the place of each digit.
_DIGIT = 8
_BLOCK = 2048
# Rows of up to so many scores are one program's, with a warp for so many of them.
_SMALL, _OF_A_WARP = 8192, 1024


@jit
def ordered(x):
    """Integers 0 .. 2^32 - 1 in the order of the scores; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@jit
def threshold_digit(counts, wanted, BINS: tl.constexpr):
    """The digit of the wanted-th largest, and how many of those are still wanted in its bin."""
    bins = tl.arange(0, BINS)
    above = tl.cumsum(counts, 0, reverse=True)
    digit = tl.max(tl.where(above >= wanted, bins, -1), 0)
    beyond = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return digit, wanted - beyond


@jit
def _from(key, real, mid):
    """How many keys are at least this one; none is 2^31 - 1."""
    return tl.sum((real & (key >= tl.minimum(mid, 2**31 - 1).to(tl.int32))).to(tl.int32))


@jit
def small_kernel(scores, out, E, stride, COUNT, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):
    """Grid (R): a whole row in registers. The threshold is found by bisection: three counts a turn.

    From `low` on there are at least as many as wanted, from `high` on fewer.
    """
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < E
    x = tl.load(scores + row * stride + at, mask=real, other=0.0)
    key = tl.minimum(key_of(x), 2**31 - 2)
    low = tl.min(tl.where(real, key, 2**31 - 1)).to(tl.int64)
    high, found = tl.max(tl.where(real, key, -(2**31))).to(tl.int64) + 1, E
    while (found > COUNT) & (high - low > 1):
        a, b, c = between(low, high)
        from_a, from_b, from_c = _from(key, real, a), _from(key, real, b), _from(key, real, c)
        low, high = closer(COUNT, low, high, a, b, c, from_a, from_b, from_c)
        at_low = tl.where(from_b >= COUNT, from_b, tl.where(from_a >= COUNT, from_a, found))
        found = tl.where(from_c >= COUNT, from_c, at_low)
    least = low.to(tl.int32)
    chosen = real & (key >= least)
    if found > COUNT:  # ties at the threshold: the first of them
        equal = real & (key == least)
        wanted = COUNT - _from(key, real, low + 1)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        chosen = chosen & ((key > least) | (rank <= wanted))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + row * COUNT + place, at.to(tl.int64), mask=chosen)


@jit
def narrowed(known, counts, COUNT, TURN: tl.constexpr, DIGIT: tl.constexpr):
    """The threshold's first `TURN` digits, and how many of those that have them are wanted."""
    if TURN == 0:
        return tl.zeros([], tl.uint32), tl.zeros([], tl.int32) + COUNT
    least, wanted = tl.zeros([], tl.uint32), tl.zeros([], tl.int32) + COUNT
    if TURN > 1:
        least = tl.load(known).to(tl.uint32, bitcast=True)
        wanted = tl.load(known + 1)
    bins = tl.arange(0, 1 << DIGIT)
    digit, wanted = threshold_digit(tl.load(counts + bins), wanted, 1 << DIGIT)
    return (least << DIGIT) | digit.to(tl.uint32), wanted


@jit
def digit_kernel(
    scores, counts, known, E, stride, COUNT, TURN: tl.constexpr, BLOCK: tl.constexpr,
    DIGIT: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, R): count this turn's digit where all earlier digits agree with the threshold.

    `counts` is `[R, turns, BINS]`, zero at first; `known` is `[R, turns + 1, 2]`.
    """
    begin(EARLY)
    BINS: tl.constexpr = 1 << DIGIT
    TURNS: tl.constexpr = 32 // DIGIT
    row = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < E
    key = ordered(tl.load(scores + row.to(tl.int64) * stride + at, mask=real, other=0.0))
    counts += row * TURNS * BINS
    known += row * (TURNS + 1) * 2
    if TURN > 0:
        least, wanted = narrowed(
            known + 2 * (TURN - 1), counts + (TURN - 1) * BINS, COUNT, TURN, DIGIT
        )
        if tl.program_id(0) == 0:
            tl.store(known + 2 * TURN, least.to(tl.int32, bitcast=True))
            tl.store(known + 2 * TURN + 1, wanted)
        real = real & ((key >> (32 - DIGIT * TURN)) == least)
    digits = ((key >> (32 - DIGIT * (TURN + 1))) & (BINS - 1)).to(tl.int32)
    found = tl.histogram(digits, BINS, mask=real)
    tl.atomic_add(counts + TURN * BINS + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@jit
def tally_kernel(
    scores, counts, known, tally, E, stride, COUNT, BLOCK: tl.constexpr, DIGIT: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, R): how many of a block exceed the threshold and how many equal it."""
    begin(EARLY)
    BINS: tl.constexpr = 1 << DIGIT
    TURNS: tl.constexpr = 32 // DIGIT
    row, block = tl.program_id(1), tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < E
    key = ordered(tl.load(scores + row.to(tl.int64) * stride + at, mask=real, other=0.0))
    known += row * (TURNS + 1) * 2
    counts += (row * TURNS + TURNS - 1) * BINS
    least, wanted = narrowed(known + 2 * (TURNS - 1), counts, COUNT, TURNS, DIGIT)
    if block == 0:
        tl.store(known + 2 * TURNS, least.to(tl.int32, bitcast=True))
        tl.store(known + 2 * TURNS + 1, wanted)
    to = tally + (row * tl.num_programs(0) + block) * 2
    tl.store(to, tl.sum((real & (key > least)).to(tl.int32), 0))
    tl.store(to + 1, tl.sum((real & (key == least)).to(tl.int32), 0))


@jit
def pick_kernel(
    scores, known, tally, out, E, stride, COUNT, BLOCKS, BLOCK: tl.constexpr,
    DIGIT: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, R): write the picks of a block behind those of the blocks before it."""
    begin(EARLY)
    TURNS: tl.constexpr = 32 // DIGIT
    row, block = tl.program_id(1), tl.program_id(0)
    known += (row * (TURNS + 1) + TURNS) * 2
    least, wanted = tl.load(known).to(tl.uint32, bitcast=True), tl.load(known + 1)
    of = tally + row * BLOCKS * 2
    here = tl.load(of + 2 * block) + tl.load(of + 2 * block + 1)
    if here > 0:
        others = tl.arange(0, MOST)
        before = others < block
        above_before = tl.sum(tl.load(of + 2 * others, mask=before, other=0), 0)
        equal_before = tl.sum(tl.load(of + 2 * others + 1, mask=before, other=0), 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        real = at < E
        key = ordered(tl.load(scores + row.to(tl.int64) * stride + at, mask=real, other=0.0))
        above, equal = real & (key > least), real & (key == least)
        rank = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        chosen = above | (equal & (rank <= wanted))
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        place += above_before + tl.minimum(equal_before, wanted)
        tl.store(out + row.to(tl.int64) * COUNT + place, at.to(tl.int64), mask=chosen)


@select.twin("triton", runs)
def _select(scores_RE: Tensor, count: int, block: int = _BLOCK, warps: int = 4) -> Tensor:
    rows, e = scores_RE.shape
    device = scores_RE.device
    out = torch.empty(rows, count, dtype=torch.int64, device=device)
    if not rows:
        return out
    scores_RE = scores_RE.float()
    stride = scores_RE.stride(0)
    if e <= _SMALL:
        size = max(256, triton.next_power_of_2(e))
        warps = max(4, min(32, size // _OF_A_WARP))
        small_kernel[(rows,)](
            scores_RE, out, e, stride, count, BLOCK=size, num_warps=warps, **early()
        )
        return out
    blocks = triton.cdiv(e, block)
    turns = 32 // _DIGIT
    counts = torch.zeros(rows, turns, 1 << _DIGIT, dtype=torch.int32, device=device)
    known = torch.empty(rows, turns + 1, 2, dtype=torch.int32, device=device)
    tally = torch.empty(rows, blocks, 2, dtype=torch.int32, device=device)
    grid, cut = (blocks, rows), {"BLOCK": block, "DIGIT": _DIGIT, "num_warps": warps} | early()
    for turn in range(turns):
        digit_kernel[grid](scores_RE, counts, known, e, stride, count, TURN=turn, **cut)
    tally_kernel[grid](scores_RE, counts, known, tally, e, stride, count, **cut)
    most = triton.next_power_of_2(blocks)
    pick_kernel[grid](scores_RE, known, tally, out, e, stride, count, blocks, MOST=most, **cut)
    return out
