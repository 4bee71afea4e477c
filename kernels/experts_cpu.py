"""Compiled twins of the feed-forward experts, routed and shared.

An expert's matrices are read once for all of its rows. Legend as in `experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.experts import Matrices, run_pairs
from whalepod.kernels.linear_cpu import COLUMNS, multiply, packed, plain
from whalepod.kernels.simd import (
    LANES,
    add,
    div,
    exp,
    get,
    get_int,
    least,
    load,
    most,
    mul,
    put,
    put_int,
    splat,
    store,
    sub,
)
from whalepod.kernels.swiglu import swiglu

_BYTES = 4 * LANES
_ZERO, _ONE = np.float32(0), np.float32(1)
# Rows of an expert that are taken at a time: what lies between the products stays in cache.
_ROWS = 64


@entry("limit")
def activate(gate_up, inner, rows, width, limit, weights):
    """Clamped SwiGLU of `[rows, 2 * width]`, times a weight a row where there are some."""
    high, low = splat(np.float32(limit)), splat(np.float32(-limit))
    one, zero = splat(_ONE), splat(_ZERO)
    for m in range(rows):
        row, to = gate_up + m * width * 8, inner + m * width * 4
        weight = splat(get(weights + m * 4)) if weights else one
        for i in range(0, width * 4, _BYTES):
            gate = least(high, load(row + i))  # in this order a NaN stays one
            up = most(low, least(high, load(row + width * 4 + i)))
            gate = div(gate, add(one, exp(sub(zero, gate))))
            store(to + i, mul(mul(gate, up), weight))


@compiled
def copy_row(source, target, count):
    """Copy `count` numbers, a multiple of 16."""
    for i in range(0, count * 4, _BYTES):
        store(target + i, load(source + i))


@entry("limit")
def _run(
    x, x_step, share, experts, weights, pairs, table, distinct, width, inner, limit, order, room, y
):
    """`table` holds (expert, up, its bytes a weight, down, its bytes a weight) for each of `distinct` experts."""
    x_room = room
    up_room = x_room + _ROWS * width * 4
    inner_room = up_room + _ROWS * inner * 8
    weight_room = inner_room + _ROWS * inner * 4
    wide_room = weight_room + _ROWS * 4
    for e in range(distinct):
        expert = get_int(table + e * 40)
        count = 0
        for n in range(pairs):
            if get_int(experts + n * 8) == expert:
                put_int(order + count * 8, n)
                count += 1
        for first in range(0, count, _ROWS):
            rows = min(_ROWS, count - first)
            for m in range(rows):
                n = get_int(order + (first + m) * 8)
                copy_row(x + n // share * x_step, x_room + m * width * 4, width)
                put(weight_room + m * 4, get(weights + n * 4))
            up, down = get_int(table + e * 40 + 8), get_int(table + e * 40 + 24)
            up_size, down_size = get_int(table + e * 40 + 16), get_int(table + e * 40 + 32)
            multiply(
                x_room,
                width * 4,
                up,
                up_size,
                width,
                up_room,
                inner * 8,
                rows,
                2 * inner,
                wide_room,
            )
            activate(up_room, inner_room, rows, inner, limit, weight_room)
            multiply(
                inner_room,
                inner * 4,
                down,
                down_size,
                inner,
                x_room,
                width * 4,
                rows,
                width,
                wide_room,
            )
            for m in range(rows):
                n = get_int(order + (first + m) * 8)
                copy_row(x_room + m * width * 4, y + n * width * 4, width)


def _row(matrices: Matrices) -> tuple[int, ...]:
    """Addresses and sizes of both matrices' panels, which are kept for as long as they are used."""
    if matrices.kept is None:
        up, down = packed(matrices.w13), packed(matrices.w2)
        matrices.kept = (up.address, up.size, down.address, down.size), (up, down)
    row: tuple[int, ...] = matrices.kept[0]  # type: ignore[index]
    return row


@run_pairs.twin("compiled", runs)
def _run_pairs(
    x_MD: Tensor,
    experts_N: Tensor,
    weights_N: Tensor,
    share: int,
    table: Mapping[int, Matrices],
    limit: float,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    distinct = set(experts_N.tolist())
    one = table[next(iter(distinct))]
    width, inner = one.w2.shape
    if rounding or width % LANES or inner % LANES or not plain(x_MD, weights_N, one.w13, one.w2):
        return run_pairs.reference(x_MD, experts_N, weights_N, share, table, limit, rounding)
    x, experts, weights = x_MD.contiguous(), experts_N.contiguous(), weights_N.contiguous()
    pairs = experts.shape[0]
    rows = np.array([(e, *_row(table[e])) for e in distinct], dtype=np.int64)
    order = torch.empty(pairs, dtype=torch.int64)
    wide = max(width, inner) * COLUMNS * LANES
    room, y = torch.empty(_ROWS * (width + 3 * inner + 1) + wide), torch.empty(pairs, width)
    _run(
        *(x.data_ptr(), width * 4, share, experts.data_ptr(), weights.data_ptr(), pairs),
        *(rows.ctypes.data, len(distinct), width, inner, limit, order.data_ptr()),
        *(room.data_ptr(), y.data_ptr()),
    )
    return y


@swiglu.twin("compiled", runs)
def _swiglu(gate_up: Tensor, limit: float, weight_M: Tensor | None = None) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if width % LANES or not plain(gate_up, *(() if weight_M is None else (weight_M,))):
        return swiglu.reference(gate_up, limit, weight_M)
    x, y = gate_up.contiguous(), torch.empty(rows, width)
    weights = None if weight_M is None else weight_M.contiguous()
    to = 0 if weights is None else weights.data_ptr()
    activate(x.data_ptr(), y.data_ptr(), rows, width, limit, to)
    return y
