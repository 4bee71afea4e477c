"""Compiled twin of `attend`: a row's keys are listed by address and read where they lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.attend import Listed, Rows, attend, keep_rows, write_ring
from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.linear_cpu import COLUMNS, plain
from whalepod.kernels.rotary_cpu import turn
from whalepod.kernels.simd import (
    LANES,
    add,
    exp,
    get,
    get_int,
    largest,
    load,
    most,
    mul,
    put,
    put_int,
    splat,
    store,
    sub,
    total,
)
from whalepod.kernels.tiles import products, weighted

_BYTES = 4 * LANES
_KEYS = 4 if COLUMNS == 4 else 2  # 4 heads x so many keys stay in registers
_scores4, _scores1 = products(4, _KEYS), products(1, _KEYS)
_sum4, _sum1 = weighted(4, COLUMNS), weighted(1, COLUMNS)
_sum4_thin, _sum1_thin = weighted(4, 1), weighted(1, 1)
_NONE = np.float32(-np.inf)


@compiled
def _list_keys(keys, new, ring, row, width, window, position, start, first, pool, listed, count):
    """Write the addresses of a row's keys, the ring by slot and then its entries; returns how many."""
    here, found = position % window, 0
    for s in range(window):
        at = position - here + s
        if s > here:
            at -= window
        if at < 0:
            break
        fresh, old = new + (first + at - start) * row, ring + s * width * 4
        put_int(keys + found * 8, fresh if at >= start else old)
        found += 1
    for e in range(count):
        put_int(keys + found * 8, pool + get_int(listed + e * 8) * width * 4)
        found += 1
    padded = (found + LANES - 1) // LANES * LANES
    for n in range(found, padded):
        put_int(keys + n * 8, get_int(keys))
    return found


@compiled
def _weigh(z, found, sink, scale):
    """Turn products into `exp(z - max)`, padding into 0; returns one over their sum and the sink's."""
    padded = (found + LANES - 1) // LANES * LANES
    for n in range(found, padded):
        put(z + n * 4, _NONE)
    factor, top = splat(np.float32(scale)), splat(_NONE)
    for n in range(0, padded * 4, _BYTES):
        v = mul(load(z + n), factor)
        store(z + n, v)
        top = most(v, top)
    high = max(largest(top), sink)
    shift, whole = splat(high), splat(np.float32(0))
    for n in range(0, padded * 4, _BYTES):
        v = exp(sub(load(z + n), shift))
        store(z + n, v)
        whole = add(whole, v)
    return np.float32(1) / (total(whole) + total(exp(splat(sink - high))) / np.float32(LANES))


@entry("scale")
def _attend(
    q,
    new,
    new_step,
    ring,
    slots,
    starts,
    firsts,
    positions,
    pool,
    listed,
    offsets,
    counts,
    sink,
    turns,
    pairs,
    rows,
    heads,
    width,
    window,
    scale,
    room,
    most_keys,
    y,
):
    keys, z = room, room + most_keys * 8
    z_step = most_keys * 4
    head = width * 4
    for t in range(rows):
        count, entries = 0, listed
        if pool:
            count, entries = get_int(counts + t * 8), listed + get_int(offsets + t * 8) * 8
        found = _list_keys(
            keys,
            new,
            ring + get_int(slots + t * 8) * window * head,
            new_step,
            width,
            window,
            get_int(positions + t * 8),
            get_int(starts + t * 8),
            get_int(firsts + t * 8),
            pool,
            entries,
            count,
        )
        q_t, y_t = q + t * heads * head, y + t * heads * head
        h = 0
        while h < heads:
            many = 4 if h + 4 <= heads else 1
            for n in range(0, found, _KEYS):
                if many == 4:
                    _scores4(q_t + h * head, head, keys + n * 8, width // LANES, z + n * 4, z_step)
                else:
                    _scores1(q_t + h * head, head, keys + n * 8, width // LANES, z + n * 4, z_step)
            for i in range(many):
                share = _weigh(z + i * z_step, found, get(sink + (h + i) * 4), scale)
                put(room + most_keys * 24 + i * 4, share)
            d = 0
            while d < width:
                to = y_t + h * head + d * 4
                if width - d >= LANES * COLUMNS:
                    if many == 4:
                        _sum4(z, z_step, keys, d * 4, found, to, head, LANES * COLUMNS)
                    else:
                        _sum1(z, z_step, keys, d * 4, found, to, head, LANES * COLUMNS)
                    d += LANES * COLUMNS
                else:
                    if many == 4:
                        _sum4_thin(z, z_step, keys, d * 4, found, to, head, LANES)
                    else:
                        _sum1_thin(z, z_step, keys, d * 4, found, to, head, LANES)
                    d += LANES
            for i in range(many):
                share = splat(get(room + most_keys * 24 + i * 4))
                to = y_t + (h + i) * head
                for b in range(0, head, _BYTES):
                    store(to + b, mul(load(to + b), share))
                turn(to + (width - 2 * pairs) * 4, turns + t * pairs * 8, pairs, True)
            h += many


@attend.twin("compiled", runs)
def _attend_rows(
    q_THD: Tensor,
    new_TD: Tensor,
    ring_NWD: Tensor,
    rows: Rows,
    entries_FD: Tensor | None,
    listed: Listed | None,
    sink_H: Tensor,
    turns_TP: Tensor,
) -> Tensor:
    count, heads, width = q_THD.shape
    pairs, window = turns_TP.shape[-1], ring_NWD.shape[1]
    whole = ring_NWD.is_contiguous() and (entries_FD is None or entries_FD.is_contiguous())
    if width % LANES or not whole or not plain(q_THD, new_TD, ring_NWD, sink_H):
        return attend.reference(q_THD, new_TD, ring_NWD, rows, entries_FD, listed, sink_H, turns_TP)
    turns_TP = turns_TP.contiguous()
    q, y = q_THD.contiguous(), torch.empty(count, heads, width)
    new = new_TD if new_TD.stride(1) == 1 else new_TD.contiguous()
    pool, places = 0, (0, 0, 0)
    if entries_FD is not None and listed is not None and listed.most:
        pool = entries_FD.data_ptr()
        places = (listed.rows.data_ptr(), listed.offset_T.data_ptr(), listed.count_T.data_ptr())
    most_keys = -(-(window + (listed.most if listed is not None else 0)) // LANES) * LANES
    room = torch.empty(most_keys * 6 + LANES)
    _attend(
        *(q.data_ptr(), new.data_ptr(), new.stride(0) * 4, ring_NWD.data_ptr()),
        *(rows.slot_T.data_ptr(), rows.start_T.data_ptr(), rows.first_T.data_ptr()),
        *(rows.position_T.data_ptr(), pool, *places, sink_H.data_ptr(), turns_TP.data_ptr()),
        *(pairs, count, heads, width, window, width**-0.5, room.data_ptr(), most_keys),
        y.data_ptr(),
    )
    return y


@entry()
def _keep(ring, new, step, slots, positions, count, window, width):
    for t in range(count):
        place = get_int(slots + t * 8) * window + get_int(positions + t * 8) % window
        for b in range(0, width * 4, _BYTES):
            store(ring + place * width * 4 + b, load(new + t * step + b))


@keep_rows.twin("compiled", runs)
def _keep_rows(ring_NWD: Tensor, new_TD: Tensor, rows: Rows, count: int) -> None:
    (_, window, width), step = ring_NWD.shape, new_TD.stride(0) * 4
    if width % LANES or new_TD.stride(1) != 1 or not plain(ring_NWD, new_TD):
        keep_rows.reference(ring_NWD, new_TD, rows, count)
        return
    places = rows.slot_T.data_ptr(), rows.position_T.data_ptr()
    _keep(ring_NWD.data_ptr(), new_TD.data_ptr(), step, *places, count, window, width)


@entry()
def _write(ring, values, step, start, count, size, width):
    for i in range(count):
        to = ring + (start + i) % size * width * 4
        for b in range(0, width * 4, _BYTES):
            store(to + b, load(values + i * step + b))


@write_ring.twin("compiled", runs)
def _write_ring(rings: Tensor, slot: int, start: int, values: Tensor) -> None:
    row = values[:1]
    width = row.numel()
    if width % LANES or not row.is_contiguous() or not plain(rings, values):
        write_ring.reference(rings, slot, start, values)
        return
    ring, size = rings.data_ptr() + slot * rings.stride(0) * 4, rings.shape[1]
    _write(ring, values.data_ptr(), values.stride(0) * 4, start, len(values), size, width)
