"""Triton source of `compress`.

A program takes a window and some of its channels: all of them for the eight slots of ratio 4, fewer
for the many slots of other ratios. There the last of a window's programs to finish does the norm,
which needs all channels; it knows by a counter that it leaves at zero again.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from whalepod.kernels.counters import zeros
from whalepod.kernels.entries import Storage
from whalepod.kernels.entries_triton import layout, put_rows
from whalepod.kernels.jit import FIXED, jit, tl, triton
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.rms_norm import normed
from whalepod.kernels.rope import turned

if TYPE_CHECKING:
    from whalepod.kernels.compress import Pooling

# Slots times channels of a program: decoding reads rings, of which more are on their way with small tiles.
# And how many of them are a warp's.
_DECODE_TILE, _CHUNK_TILE, _OF_A_WARP = 4096, 8192, 1024


@jit
def _sum(x, J: tl.constexpr, COLS: tl.constexpr):
    """Sum the first dim of `[J, COLS]`, halves first: `tl.sum` adds as its operand happens to lie."""
    rest: tl.constexpr = J
    for level in tl.static_range(8):
        if (rest >> level) > 1:
            a, b = tl.split(tl.permute(tl.reshape(x, (2, rest >> (level + 1), COLS)), (1, 2, 0)))
            x = a + b
    return tl.reshape(x, (COLS,))


@jit
def _pool(values, logits, J: tl.constexpr, COLS: tl.constexpr):
    """Gated softmax over the first dim of `[J, COLS]`; -inf marks what is absent.

    The bits are the same in both kernels: a product that were left to be joined with the sum that
    follows would be rounded in one and not in the other.
    """
    weight = tl.exp(logits - tl.max(logits, 0)[None, :])
    product = tl.fma(weight, values, tl.zeros((J, COLS), tl.float32))
    return _sum(product, J, COLS) / _sum(weight, J, COLS)


@jit
def _finish(
    pooled, part, counters, key, norm, turns, row, EPS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW_COLS: tl.constexpr, dense, data, wide, STRIDE: tl.constexpr, COUNT: tl.constexpr,
    DATA: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    ROUNDING: tl.constexpr, PAGED: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    CUTS: tl.constexpr, WIDTH: tl.constexpr, pools,
):  # fmt: skip
    """Norm, rotation, rounding and storing of one entry, once all its parts are there."""
    d, one = tl.arange(0, WIDTH)[None, :], tl.arange(0, 1)
    channel = part * WINDOW_COLS + tl.arange(0, WINDOW_COLS)
    tl.store(pools + key * D + channel, pooled, mask=channel < D)
    tl.debug_barrier()
    last = True
    if PARTS > 1:
        last = tl.atomic_add(counters + key, 1, sem="acq_rel") == PARTS - 1
    if last:
        # Read back where there is one part as well: so it lies, and the norm adds, as in the other kernel.
        value = tl.load(pools + key * D + d, mask=d < D, other=0.0, cache_modifier=".cg")
        if PARTS > 1:
            tl.store(counters + key, 0)
        value = normed(rounded(value, KIND, CUTS).to(tl.float32), D, EPS)
        value = value * tl.load(norm + d, mask=d < D, other=0.0)
        value = rounded(value, KIND, CUTS).to(tl.float32)
        value = turned(value, turns, D, PAIRS, 1, WIDTH)
        value = rounded(value, KIND, CUTS).to(tl.float32)
        put_rows(
            value, one.to(tl.int64) + row, one == 0, dense, data, wide, STRIDE, COUNT, DATA, SCALES,
            D, PAIRS, ROUNDING, PAGED, KIND, FACTOR, CUTS, 1, WIDTH,
        )  # fmt: skip


@jit
def decode_kernel(
    rows, ape, raw, norm, turns, slots, positions, blocks, pools, counters, stride, R,
    PER: tl.constexpr, RATIO: tl.constexpr, J: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, WINDOW_COLS: tl.constexpr, dense, data, wide, STRIDE: tl.constexpr,
    COUNT: tl.constexpr, DATA: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr, ROUNDING: tl.constexpr, PAGED: tl.constexpr, KIND: tl.constexpr,
    FACTOR: tl.constexpr, CUTS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """One row and some channels; the window's other rows come from the ring."""
    begin(EARLY)
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    OVERLAP: tl.constexpr = RATIO == 4
    C: tl.constexpr = 2 * D if OVERLAP else D
    position = tl.load(positions + n)
    ring = raw + tl.load(slots + n) * R * (2 * C)
    channel = part * WINDOW_COLS + tl.arange(0, WINDOW_COLS)
    kept = channel < D
    bias = ape + (position % RATIO) * C + channel
    own, here = rows + n * stride + channel, ring + (position % R) * (2 * C) + channel
    value = tl.load(own, mask=kept, other=0.0)
    logit = tl.load(own + C, mask=kept, other=0.0) + tl.load(bias, mask=kept, other=0.0)
    first, first_logit = value, logit
    if OVERLAP:  # the second half of the channels is the one that its own window pools
        value = tl.load(own + D, mask=kept, other=0.0)
        logit = tl.load(own + C + D, mask=kept, other=0.0) + tl.load(bias + D, mask=kept, other=0.0)
    if (position + 1) % RATIO == 0:
        j = tl.arange(0, J)
        before = position - (J - 1) + j
        at = ((before + R) % R) * (2 * C)
        if OVERLAP:
            at += tl.where(j < RATIO, 0, D)
        there = ((before >= 0) & (j < J - 1))[:, None] & kept[None, :]
        where = ring + at[:, None] + channel[None, :]
        mine = (j == J - 1)[:, None]
        values = tl.load(where, mask=there, other=0.0)
        logits = tl.load(where + C, mask=there, other=float("-inf"))
        pooled = _pool(
            tl.where(mine, value[None, :], values), tl.where(mine, logit[None, :], logits),
            J, WINDOW_COLS,
        )  # fmt: skip
        number = position // RATIO
        row = tl.load(blocks + n) * PER + number % PER
        _finish(
            pooled, part, counters, n, norm, turns + n * (2 * PAIRS), row, EPS, PARTS, WINDOW_COLS,
            dense, data, wide, STRIDE, COUNT, DATA, SCALES, D, PAIRS, ROUNDING, PAGED, KIND, FACTOR,
            CUTS, WIDTH, pools,
        )  # fmt: skip
    # Behind the loads of the window, none of which reads this row: before them they would hold them up.
    tl.store(here, first, mask=kept)
    tl.store(here + C, first_logit, mask=kept)
    if OVERLAP:
        tl.store(here + D, value, mask=kept)
        tl.store(here + C + D, logit, mask=kept)


@jit
def chunk_kernel(
    rows, ape, raw, norm, turns, flat, pools, counters, stride, start, end, R,
    RATIO: tl.constexpr, J: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW_COLS: tl.constexpr, dense, data, wide, STRIDE: tl.constexpr, COUNT: tl.constexpr,
    DATA: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    ROUNDING: tl.constexpr, PAGED: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    CUTS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """One window and some channels: each element of the rows is read, biased and pooled once."""
    begin(EARLY)
    made, part = tl.program_id(0), tl.program_id(1)
    OVERLAP: tl.constexpr = RATIO == 4
    C: tl.constexpr = 2 * D if OVERLAP else D
    window = start // RATIO + made
    channel = part * WINDOW_COLS + tl.arange(0, WINDOW_COLS)
    kept = (channel < D)[None, :]
    j = tl.arange(0, J)
    position = (window + 1) * RATIO - J + j
    half = tl.where(j < RATIO, 0, D) if OVERLAP else tl.zeros((J,), tl.int32)
    column = half[:, None] + channel[None, :]
    new = ((position >= start) & (position < end))[:, None] & kept
    old = ((position >= 0) & (position < start))[:, None] & kept
    own = rows + (position - start).to(tl.int64)[:, None] * stride + column
    ring = raw + (tl.maximum(position, 0) % R).to(tl.int64)[:, None] * (2 * C) + column
    bias = tl.load(
        ape + (tl.maximum(position, 0) % RATIO)[:, None] * C + column, mask=new, other=0.0
    )
    logits = tl.load(own + C, mask=new, other=float("-inf")) + bias
    whole = window < end // RATIO
    values = tl.load(own, mask=new & whole, other=0.0)  # before the store, which would hold it up
    tl.store(own + C, logits, mask=new)
    if whole:
        values += tl.load(ring, mask=old, other=0.0)
        logits = tl.where(old, tl.load(ring + C, mask=old, other=0.0), logits)
        logits = tl.where(kept, logits, 0.0)
        _finish(
            _pool(values, logits, J, WINDOW_COLS), part, counters, made.to(tl.int64), norm,
            turns + made.to(tl.int64) * (2 * PAIRS), tl.load(flat + made), EPS, PARTS, WINDOW_COLS,
            dense, data, wide, STRIDE, COUNT, DATA, SCALES, D, PAIRS, ROUNDING, PAGED, KIND, FACTOR,
            CUTS, WIDTH, pools,
        )  # fmt: skip


def _shared(
    rows: Tensor, how: Pooling, storage: Storage, pairs: int, many: int, tile: int
) -> dict[str, Any]:
    """Keyword arguments that both kernels take, for `many` windows."""
    size, slots = len(how.norm_D), how.slots
    spread = layout(storage, how.dtype, size, pairs, how.rounding)
    cols = min(spread["WIDTH"], max(32, tile // slots))
    parts = triton.cdiv(spread["WIDTH"], cols)
    return spread | {
        "pools": rows.new_empty(many, size),
        "counters": zeros(rows.device, many) if parts > 1 else None,
        "RATIO": how.ratio,
        "J": slots,  # a power of two
        "EPS": how.eps,
        "PARTS": parts,
        "WINDOW_COLS": cols,
        **FIXED,
        **early(),
        "num_warps": max(1, cols * slots // _OF_A_WARP),
    }


def decode(
    rows_N2C: Tensor, how: Pooling, raw_SR2C: Tensor, entries: Storage, slots_N: Tensor,
    positions_N: Tensor, blocks_N: Tensor, per_block: int, turns_NP: Tensor,
) -> None:  # fmt: skip
    """Twin of `compress_decode`."""
    count = len(rows_N2C)
    turns = torch.view_as_real(turns_NP).contiguous()
    more = _shared(rows_N2C, how, entries, turns.shape[1], count, _DECODE_TILE)
    if count:
        decode_kernel[(count, more["PARTS"])](
            rows_N2C, how.ape_JC, raw_SR2C, how.norm_D, turns, slots_N, positions_N, blocks_N,
            stride=rows_N2C.stride(0), R=raw_SR2C.shape[1], PER=per_block, **more,
        )  # fmt: skip


def chunk(
    rows_T2C: Tensor, how: Pooling, raw_R2C: Tensor, entries: Storage, start: int, flat_X: Tensor,
    turns_XP: Tensor,
) -> None:  # fmt: skip
    """Twin of `compress_chunk`."""
    end = start + len(rows_T2C)
    turns = torch.view_as_real(turns_XP).contiguous()
    # Windows with a new row, and one more that owns the first halves of the last of them.
    many = (end - 1) // how.ratio - start // how.ratio + 1 + how.overlap
    more = _shared(rows_T2C, how, entries, turns.shape[1], many, _CHUNK_TILE)
    if end > start:
        chunk_kernel[(many, more["PARTS"])](
            rows_T2C, how.ape_JC, raw_R2C, how.norm_D, turns, flat_X, stride=rows_T2C.stride(0),
            start=start, end=end, R=raw_R2C.shape[0], **more,
        )  # fmt: skip
