"""Compiled twin of `choose_entries`.

Rows of one sequence see the same entries, later ones a few more. They are scored in groups, so that
the keys of a long context are read from memory once a group and not once a row, and on as many
threads as torch may use. Neither changes what a score's sum consists of, nor its order.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.attend import Listed
from whalepod.kernels.choose import choose_entries
from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.linear_cpu import COLUMNS, plain
from whalepod.kernels.rank_cpu import CANDIDATES, best
from whalepod.kernels.simd import LANES, fma, get, get_int, load, most, put_int, splat, store
from whalepod.kernels.tiles import products

_KEYS = 4 if COLUMNS == 4 else 2
_scores4, _scores1 = products(4, _KEYS), products(1, _KEYS)
_GROUP = 8  # rows scored together; their queries and sixteen keys stay in the L2 cache
_ROOM = LANES * 6  # numbers of scratch space: addresses of keys, products of four heads
_ENOUGH = 1 << 24  # products below which threads cost more than they bring


@compiled
def _score_row(q, gate, room, z, heads, width, scores):
    """Score the sixteen keys whose addresses lie in `room`."""
    zero = splat(np.float32(0))
    summed, h = zero, 0
    while h < heads:
        many = 4 if h + 4 <= heads else 1
        for n in range(0, LANES, _KEYS):
            if many == 4:
                _scores4(q + h * width * 4, width * 4, room + n * 8, width // LANES, z + n * 4, 64)
            else:
                _scores1(q + h * width * 4, width * 4, room + n * 8, width // LANES, z + n * 4, 64)
        for i in range(many):
            summed = fma(splat(get(gate + (h + i) * 4)), most(load(z + i * 64), zero), summed)
        h += many
    store(scores, summed)


@compiled
def _score(q, gate, rows, keys, listed, count, heads, width, room, scores, step):
    """Score `count` entries for each of a group's rows; `scores` has room for whole vectors."""
    for first in range(0, count, LANES):
        for n in range(LANES):
            row = get_int(listed + min(first + n, count - 1) * 8)
            put_int(room + n * 8, keys + row * width * 4)
        for t in range(rows):
            _score_row(
                q + t * heads * width * 4,
                gate + t * heads * 4,
                room,
                room + LANES * 8,
                heads,
                width,
                scores + (t * step + first) * 4,
            )


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
    step,
    chosen,
    kept,
):
    t = 0
    while t < tokens:
        offset, count, group = get_int(offsets + t * 8), get_int(counts + t * 8), 1
        while (
            group < _GROUP and t + group < tokens and get_int(offsets + (t + group) * 8) == offset
        ):
            count = max(count, get_int(counts + (t + group) * 8))
            group += 1
        listed = rows + offset * 8
        if count > keep:
            q_t, gate_t = q + t * heads * width * 4, gate + t * heads * 4
            _score(q_t, gate_t, group, keys, listed, count, heads, width, room, scores, step)
        for i in range(t, t + group):
            own, to = get_int(counts + i * 8), chosen + i * keep * 8
            found = own
            if own <= keep:
                for e in range(own):
                    put_int(to + e * 8, get_int(listed + e * 8))
            else:
                found = best(scores + (i - t) * step * 4, own, keep, room + _ROOM * 4, listed, to)
            put_int(kept + i * 8, found)
        t += group


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "choose")


def _borders(tokens: int, work: int) -> list[tuple[int, int]]:
    """Cut rows into a range for each thread, whole groups each."""
    parts = 1 if work < _ENOUGH else min(torch.get_num_threads(), -(-tokens // _GROUP))
    each = -(-tokens // parts // _GROUP) * _GROUP if parts > 1 else tokens
    return [(t, min(each, tokens - t)) for t in range(0, tokens, max(each, 1))]


@choose_entries.twin("compiled", runs)
def _choose_entries(
    q_THI: Tensor, gate_TH: Tensor, keys_FI: Tensor, listed: Listed, keep: int
) -> Listed:
    tokens, heads, width = q_THI.shape
    if width % LANES or not plain(q_THI, gate_TH, keys_FI):
        return choose_entries.reference(q_THI, gate_TH, keys_FI, listed, keep)
    q, gate = q_THI.contiguous(), gate_TH.contiguous()
    step = -(-listed.most // LANES) * LANES
    chosen = torch.zeros(tokens * keep, dtype=torch.int64)
    kept = torch.empty(tokens, dtype=torch.int64)

    def run(part: tuple[int, int]) -> None:
        t, count = part
        room = torch.empty(_ROOM + CANDIDATES * keep)
        scores = torch.empty(min(_GROUP, count) * step)
        _choose(
            *(q[t:].data_ptr(), gate[t:].data_ptr(), keys_FI.data_ptr(), listed.rows.data_ptr()),
            *(listed.offset_T[t:].data_ptr(), listed.count_T[t:].data_ptr(), count, heads, width),
            *(keep, room.data_ptr(), scores.data_ptr(), step),
            *(chosen[t * keep :].data_ptr(), kept[t:].data_ptr()),
        )

    parts = _borders(tokens, tokens * listed.most * heads * width)
    if len(parts) > 1:
        list(_threads(len(parts)).map(run, parts))
    elif parts:
        run(parts[0])
    starts = torch.arange(0, tokens * keep, keep)
    return Listed(chosen, starts, kept, min(keep, listed.most))
