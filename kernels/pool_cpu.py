"""Compiled twin of `pool_entries`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from whalepod.kernels.attend import Rows
from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.linear_cpu import plain
from whalepod.kernels.pool import pool_entries
from whalepod.kernels.rotary_cpu import finish_head
from whalepod.kernels.simd import (
    LANES,
    add,
    div,
    exp,
    fma,
    get_int,
    load,
    most,
    splat,
    store,
    sub,
)

_BYTES = 4 * LANES


@compiled
def _slot(new, step, raw, ring, channels, position, start, first):
    """Address of the row at a position, in the pass or in the ring."""
    if position >= start:
        return new + (first + position - start) * step
    return raw + position % ring * channels * 8


@compiled
def _pool_one(new, step, raw, ring, channels, width, position, start, first, entry):
    """Pool one window per channel: the largest logit, then weights and weighted sum in order."""
    begin, overlap = position - ring + 1, channels == 2 * width
    known = max(begin, 0)
    for d in range(0, width * 4, _BYTES):
        top = splat(np.float32(-np.inf))
        for at in range(known, position + 1):
            own = overlap and at - begin >= ring // 2
            row = _slot(new, step, raw, ring, channels, at, start, first) + own * width * 4
            top = most(load(row + channels * 4 + d), top)
        whole = summed = splat(np.float32(0))
        for at in range(known, position + 1):
            own = overlap and at - begin >= ring // 2
            row = _slot(new, step, raw, ring, channels, at, start, first) + own * width * 4
            e = exp(sub(load(row + channels * 4 + d), top))
            whole, summed = add(whole, e), fma(e, load(row + d), summed)
        store(entry + d, div(summed, whole))


@entry("eps")
def _pool(
    new,
    step,
    ape,
    ratio,
    raw,
    ring,
    channels,
    slots,
    starts,
    firsts,
    positions,
    rows,
    decoding,
    closed,
    norm,
    turns,
    pairs,
    eps,
    width,
    entries,
):
    size = ring * channels * 8
    for t in range(rows):
        phase = get_int(positions + t * 8) % ratio
        for c in range(0, channels * 4, _BYTES):
            to = new + t * step + channels * 4 + c
            store(to, add(load(to), load(ape + phase * channels * 4 + c)))
    for t in range(rows):
        where = get_int(closed + t * 8)
        if where >= 0:
            entry = entries + where * width * 4
            _pool_one(
                new,
                step,
                raw + get_int(slots + t * 8) * size,
                ring,
                channels,
                width,
                get_int(positions + t * 8),
                get_int(starts + t * 8),
                get_int(firsts + t * 8),
                entry,
            )
            finish_head(entry, norm, turns + t * pairs * 8, pairs, width, eps, entry)
    for t in range(decoding):
        place = get_int(slots + t * 8) * ring + get_int(positions + t * 8) % ring
        for c in range(0, channels * 8, _BYTES):
            store(raw + place * channels * 8 + c, load(new + t * step + c))


@pool_entries.twin("compiled", runs)
def _pool_entries(
    projected_T2C: Tensor,
    ape_JC: Tensor,
    raw_NR2C: Tensor,
    rows: Rows,
    decoding: int,
    closed_T: Tensor,
    norm_D: Tensor,
    turns_TP: Tensor,
    eps: float,
    entries_FD: Tensor,
) -> None:
    (count, _, channels), width, pairs = projected_T2C.shape, entries_FD.shape[1], turns_TP.shape[1]
    whole = projected_T2C.stride()[1:] == (channels, 1) and raw_NR2C.is_contiguous()
    turns_TP = turns_TP.contiguous()
    if width % LANES or not whole or not plain(projected_T2C, entries_FD):
        pool_entries.reference(
            *(projected_T2C, ape_JC, raw_NR2C, rows, decoding, closed_T, norm_D, turns_TP, eps),
            entries_FD,
        )
        return
    _pool(
        *(projected_T2C.data_ptr(), projected_T2C.stride(0) * 4, ape_JC.data_ptr()),
        *(ape_JC.shape[0], raw_NR2C.data_ptr(), raw_NR2C.shape[1], channels),
        *(rows.slot_T.data_ptr(), rows.start_T.data_ptr(), rows.first_T.data_ptr()),
        *(rows.position_T.data_ptr(), count, decoding, closed_T.data_ptr(), norm_D.data_ptr()),
        *(turns_TP.data_ptr(), pairs, eps, width, entries_FD.data_ptr()),
    )
