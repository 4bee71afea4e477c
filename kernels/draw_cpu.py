"""Compiled twin of `best_tokens`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.compiled import entry, runs
from whalepod.kernels.draw import best_tokens
from whalepod.kernels.linear_cpu import plain
from whalepod.kernels.simd import (
    LANES,
    add,
    exp,
    get,
    largest,
    load,
    most,
    put,
    put_int,
    splat,
    sub,
    total,
)

_BYTES = 4 * LANES


@entry()
def _best(x, rows, count, best, norm):  # type: ignore[no-untyped-def]
    """`count` is a multiple of 16."""
    for m in range(rows):
        row = x + m * count * 4
        top, whole = splat(np.float32(-np.inf)), splat(np.float32(0))
        for v in range(0, count * 4, _BYTES):
            top = most(load(row + v), top)
        high, place = largest(top), 0
        while place < count - 1 and get(row + place * 4) != high:
            place += 1
        shift = splat(high)
        for v in range(0, count * 4, _BYTES):
            whole = add(whole, exp(sub(load(row + v), shift)))
        put_int(best + m * 8, place)
        put(norm + m * 4, high + np.float32(math.log(total(whole))))


@best_tokens.twin("compiled", runs)
def _best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    rows, count = logits_NV.shape
    if count % LANES or not plain(logits_NV):
        return best_tokens.reference(logits_NV)
    x, best, norm = logits_NV.contiguous(), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _best(x.data_ptr(), rows, count, best.data_ptr(), norm.data_ptr())
    return best, norm
