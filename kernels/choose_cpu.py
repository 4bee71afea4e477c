"""Compiled twin of `choose_entries`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.attend import Listed
from whalepod.kernels.choose import choose_entries
from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.linear_cpu import COLUMNS, plain
from whalepod.kernels.simd import (
    LANES,
    fma,
    get,
    get_int,
    load,
    most,
    put,
    put_int,
    splat,
    store,
)
from whalepod.kernels.tiles import products

_KEYS = 4 if COLUMNS == 4 else 2
_scores4, _scores1 = products(4, _KEYS), products(1, _KEYS)


@compiled
def _score(q, gate, keys, listed, count, heads, width, room, scores):
    """Score entries, sixteen at a time; `scores` has room for whole vectors."""
    zero = splat(np.float32(0))
    z = room + LANES * 8
    for first in range(0, count, LANES):
        for n in range(LANES):
            row = get_int(listed + min(first + n, count - 1) * 8)
            put_int(room + n * 8, keys + row * width * 4)
        summed = zero
        h = 0
        while h < heads:
            many = 4 if h + 4 <= heads else 1
            for n in range(0, LANES, _KEYS):
                if many == 4:
                    _scores4(
                        q + h * width * 4, width * 4, room + n * 8, width // LANES, z + n * 4, 64
                    )
                else:
                    _scores1(
                        q + h * width * 4, width * 4, room + n * 8, width // LANES, z + n * 4, 64
                    )
            for i in range(many):
                summed = fma(splat(get(gate + (h + i) * 4)), most(load(z + i * 64), zero), summed)
            h += many
        store(scores + first * 4, summed)


@compiled
def _nth(values, count, rank):
    """The value of a rank (0 is the largest); reorders `values`. NaNs count as equal to anything."""
    low, high = 0, count
    while True:
        pivot = get(values + (low + high) // 2 * 4)
        above, at, below = low, low, high
        while at < below:
            value = get(values + at * 4)
            if value > pivot:
                put(values + at * 4, get(values + above * 4))
                put(values + above * 4, value)
                above += 1
                at += 1
            elif value < pivot:
                below -= 1
                put(values + at * 4, get(values + below * 4))
                put(values + below * 4, value)
            else:
                at += 1
        if rank < above:
            high = above
        elif rank >= below:
            low = below
        else:
            return pivot


@entry()
def _choose(
    q,
    gate,
    keys,
    rows,
    offsets,
    counts,
    tokens,
    heads,
    width,
    keep,
    room,
    scores,
    copy,
    chosen,
    kept,
):
    for t in range(tokens):
        count, listed = get_int(counts + t * 8), rows + get_int(offsets + t * 8) * 8
        to, found = chosen + t * keep * 8, 0
        if count <= keep:
            for e in range(count):
                put_int(to + e * 8, get_int(listed + e * 8))
            put_int(kept + t * 8, count)
            continue
        q_t, gate_t = q + t * heads * width * 4, gate + t * heads * 4
        _score(q_t, gate_t, keys, listed, count, heads, width, room, scores)
        for e in range(count):
            put(copy + e * 4, get(scores + e * 4))
        least = _nth(copy, count, keep - 1)
        wanted = keep
        for e in range(count):
            wanted -= get(scores + e * 4) > least
        for e in range(count):
            score = get(scores + e * 4)
            if found < keep and (score > least or (score == least and wanted > 0)):
                wanted -= score == least
                put_int(to + found * 8, get_int(listed + e * 8))
                found += 1
        put_int(kept + t * 8, found)


@choose_entries.twin("compiled", runs)
def _choose_entries(
    q_THI: Tensor, gate_TH: Tensor, keys_FI: Tensor, listed: Listed, keep: int
) -> Listed:
    tokens, heads, width = q_THI.shape
    if width % LANES or not plain(q_THI, gate_TH, keys_FI):
        return choose_entries.reference(q_THI, gate_TH, keys_FI, listed, keep)
    q, gate = q_THI.contiguous(), gate_TH.contiguous()
    most_entries = -(-listed.most // LANES) * LANES
    room = torch.empty(LANES * 6)
    scores, copy = torch.empty(most_entries), torch.empty(most_entries)
    chosen = torch.zeros(tokens * keep, dtype=torch.int64)
    kept = torch.empty(tokens, dtype=torch.int64)
    _choose(
        *(q.data_ptr(), gate.data_ptr(), keys_FI.data_ptr(), listed.rows.data_ptr()),
        *(listed.offset_T.data_ptr(), listed.count_T.data_ptr(), tokens, heads, width, keep),
        *(room.data_ptr(), scores.data_ptr(), copy.data_ptr(), chosen.data_ptr(), kept.data_ptr()),
    )
    starts = torch.arange(0, tokens * keep, keep)
    return Listed(chosen, starts, kept, min(keep, listed.most))
