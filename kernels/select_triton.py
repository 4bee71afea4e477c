"""Exact top-k by radix on GPUs: the threshold's bits first, then places in order.

Scores become integers that sort alike. Each pass counts one digit of those that agree with the
threshold so far; the last pass knows how many exceed it before each block and how many equals it
may take, so every block writes its own picks in order. Counts are integers: no sum depends on the
order of blocks.

Legend: R rows, E scores of a row, B blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.select import select

# Bits of a digit, least significant last, and the place of each digit.
_DIGIT = 8
_BLOCK = 2048
# Rows of up to so many scores are one program's.
_SMALL = 8192


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
def small_kernel(scores, out, E, stride, COUNT, BLOCK: tl.constexpr, DIGIT: tl.constexpr):
    """Grid (R): a whole row in registers."""
    BINS: tl.constexpr = 1 << DIGIT
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < E
    key = ordered(tl.load(scores + row * stride + at, mask=real, other=0.0))
    wanted = COUNT
    least = tl.zeros([], tl.uint32)
    agree = real
    for turn in tl.static_range(32 // DIGIT):
        digits = ((key >> (32 - DIGIT * (turn + 1))) & (BINS - 1)).to(tl.int32)
        counts = tl.histogram(digits, BINS, mask=agree)
        digit, wanted = threshold_digit(counts, wanted, BINS)
        agree = agree & (digits == digit)
        least = (least << DIGIT) | digit.to(tl.uint32)
    above = real & (key > least)
    equal = real & (key == least)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + row * COUNT + place, at.to(tl.int64), mask=chosen)


@jit
def digit_kernel(
    scores, state, E, stride, COUNT, TURN: tl.constexpr, BLOCK: tl.constexpr, DIGIT: tl.constexpr
):
    """Grid (B, R): count this turn's digit where all earlier digits agree with the threshold.

    `state` is `[R, turns, BINS]`, zero at first.
    """
    BINS: tl.constexpr = 1 << DIGIT
    TURNS: tl.constexpr = 32 // DIGIT
    row = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < E
    key = ordered(tl.load(scores + row.to(tl.int64) * stride + at, mask=real, other=0.0))
    bins = tl.arange(0, BINS)
    counts_at = state + row * TURNS * BINS + bins
    wanted = COUNT
    for turn in tl.static_range(TURN):
        digit, wanted = threshold_digit(tl.load(counts_at + turn * BINS), wanted, BINS)
        real = real & (((key >> (32 - DIGIT * (turn + 1))) & (BINS - 1)).to(tl.int32) == digit)
    digits = ((key >> (32 - DIGIT * (TURN + 1))) & (BINS - 1)).to(tl.int32)
    counts = tl.histogram(digits, BINS, mask=real)
    tl.atomic_add(counts_at + TURN * BINS, counts, mask=counts > 0, sem="relaxed")


@jit
def least_kernel(state, COUNT, TURNS: tl.constexpr, BINS: tl.constexpr):
    """Not launched alone: see `tally_kernel`."""
    bins = tl.arange(0, BINS)
    wanted = COUNT
    least = tl.zeros([], tl.uint32)
    for turn in tl.static_range(TURNS):
        digit, wanted = threshold_digit(tl.load(state + turn * BINS + bins), wanted, BINS)
        least = (least << (32 // TURNS)) | digit.to(tl.uint32)
    return least, wanted


@jit
def tally_kernel(
    scores, state, tally, E, stride, COUNT, BLOCK: tl.constexpr, DIGIT: tl.constexpr
):
    """Grid (B, R): how many of a block exceed the threshold and how many equal it."""
    BINS: tl.constexpr = 1 << DIGIT
    TURNS: tl.constexpr = 32 // DIGIT
    row, block = tl.program_id(1), tl.program_id(0)
    least, _ = least_kernel(state + row * TURNS * BINS, COUNT, TURNS, BINS)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < E
    key = ordered(tl.load(scores + row.to(tl.int64) * stride + at, mask=real, other=0.0))
    to = tally + (row * tl.num_programs(0) + block) * 2
    tl.store(to, tl.sum((real & (key > least)).to(tl.int32), 0))
    tl.store(to + 1, tl.sum((real & (key == least)).to(tl.int32), 0))


@jit
def pick_kernel(
    scores, state, tally, out, E, stride, COUNT, BLOCKS, BLOCK: tl.constexpr,
    DIGIT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Grid (B, R): write the picks of a block behind those of the blocks before it."""
    BINS: tl.constexpr = 1 << DIGIT
    TURNS: tl.constexpr = 32 // DIGIT
    row, block = tl.program_id(1), tl.program_id(0)
    least, wanted = least_kernel(state + row * TURNS * BINS, COUNT, TURNS, BINS)
    others = tl.arange(0, MOST)
    before = others < block
    of = tally + (row * BLOCKS + others) * 2
    above_before = tl.sum(tl.load(of, mask=before, other=0), 0)
    equal_before = tl.sum(tl.load(of + 1, mask=before, other=0), 0)
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
        small_kernel[(rows,)](
            scores_RE, out, e, stride, count, BLOCK=size, DIGIT=_DIGIT, num_warps=8
        )
        return out
    blocks = triton.cdiv(e, block)
    turns = 32 // _DIGIT
    state = torch.zeros(rows, turns, 1 << _DIGIT, dtype=torch.int32, device=device)
    tally = torch.empty(rows, blocks, 2, dtype=torch.int32, device=device)
    grid, cut = (blocks, rows), {"BLOCK": block, "DIGIT": _DIGIT, "num_warps": warps}
    for turn in range(turns):
        digit_kernel[grid](scores_RE, state, e, stride, count, TURN=turn, **cut)
    tally_kernel[grid](scores_RE, state, tally, e, stride, count, **cut)
    most = triton.next_power_of_2(blocks)
    pick_kernel[grid](scores_RE, state, tally, out, e, stride, count, blocks, MOST=most, **cut)
    return out
