"""Compiled twins of the norms and rotary positions of heads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.compiled import compiled, entry, runs
from whalepod.kernels.hyper_connection_cpu import mean_square
from whalepod.kernels.linear_cpu import plain
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.simd import LANES, get, load, mul, put, rotate, rotate_back, splat, store

_BYTES = 4 * LANES


@compiled
def turn(x, turns, pairs, back):
    """Rotate adjacent pairs in place, by the opposite angles with `back`."""
    i, last = 0, pairs * 8
    while i + _BYTES <= last:
        if back:
            store(x + i, rotate_back(load(x + i), load(turns + i)))
        else:
            store(x + i, rotate(load(x + i), load(turns + i)))
        i += _BYTES
    while i < last:
        a, b, c, s = get(x + i), get(x + i + 4), get(turns + i), get(turns + i + 4)
        s = -s if back else s
        put(x + i, a * c - b * s)
        put(x + i + 4, b * c + a * s)
        i += 8


@compiled
def finish_head(x, weight, turns, pairs, width, eps, y):
    """Norm (none with eps below 0) and rotation (none with no pairs) of one vector; y may be x."""
    scale = splat(np.float32(1))
    if eps >= 0:
        scale = splat(np.float32(1) / np.sqrt(mean_square(x, width) + np.float32(eps)))
    for d in range(0, width * 4, _BYTES):
        v = mul(load(x + d), scale)
        if weight:
            v = mul(v, load(weight + d))
        store(y + d, v)
    turn(y + (width - 2 * pairs) * 4, turns, pairs, False)


@entry("eps")
def _heads(x, row_step, head_step, weight, turns, pairs, rows, heads, width, eps, y):
    for t in range(rows):
        for h in range(heads):
            at, to = x + t * row_step + h * head_step, y + (t * heads + h) * width * 4
            finish_head(at, weight, turns + t * pairs * 8, pairs, width, eps, to)


@norm_rotate.twin("compiled", runs)
def _norm_rotate(x_THD: Tensor, weight_D: Tensor | None, turns_TP: Tensor, eps: float) -> Tensor:
    rows, heads, width = x_THD.shape
    pairs = turns_TP.shape[-1]
    if width % LANES or not plain(x_THD):
        return norm_rotate.reference(x_THD, weight_D, turns_TP, eps)
    if x_THD.stride(2) != 1:
        x_THD = x_THD.contiguous()
    turns, y = turns_TP.contiguous(), torch.empty(rows, heads, width)
    weight = 0 if weight_D is None or eps < 0 else weight_D.data_ptr()
    _heads(
        *(x_THD.data_ptr(), x_THD.stride(0) * 4, x_THD.stride(1) * 4, weight, turns.data_ptr()),
        *(pairs, rows, heads, width, eps, y.data_ptr()),
    )
    return y


@rms_norm.twin("compiled", runs)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1]
    wanted = (x,) if weight is None else (x, weight)
    if width % LANES or not plain(*wanted):
        return rms_norm.reference(x, weight, eps)
    flat = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, width)
    y, at = torch.empty(x.shape), 0 if weight is None else weight.data_ptr()
    rows = flat.shape[0]
    _heads(flat.data_ptr(), flat.stride(0) * 4, 0, at, 0, 0, rows, 1, width, eps, y.data_ptr())
    return y
