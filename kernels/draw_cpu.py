"""Compiled twins of `best_tokens` and `ranked`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.compiled import entry, runs
from whalepod.kernels.draw import best_tokens, ranked
from whalepod.kernels.linear_cpu import plain
from whalepod.kernels.simd import (
    LANES,
    add,
    exp,
    get,
    get_bits,
    get_int,
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
def _best(x, rows, count, best, norm):
    """`count` is a multiple of 16."""
    for m in range(rows):
        row = x + m * count * 4
        top, whole, seen = splat(np.float32(-np.inf)), splat(np.float32(0)), splat(np.float32(0))
        for v in range(0, count * 4, _BYTES):
            top = most(load(row + v), top)
            seen = add(seen, load(row + v))
        high, place = largest(top), 0
        while place < count - 1 and get(row + place * 4) != high:
            place += 1
        shift = splat(high)
        for v in range(0, count * 4, _BYTES):
            whole = add(whole, exp(sub(load(row + v), shift)))
        put_int(best + m * 8, place)
        sound = total(seen) == total(seen)  # `most` and `exp` pass over a NaN, a sum does not
        put(
            norm + m * 4, high + np.float32(math.log(total(whole))) if sound else np.float32(np.nan)
        )


@best_tokens.twin("compiled", runs)
def _best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    rows, count = logits_NV.shape
    if count % LANES or not plain(logits_NV):
        return best_tokens.reference(logits_NV)
    x, best, norm = logits_NV.contiguous(), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _best(x.data_ptr(), rows, count, best.data_ptr(), norm.data_ptr())
    return best, norm


# Three passes over the 32 bits of a key, least significant first.
_BITS = 11
_BUCKETS = 1 << _BITS


@entry()
def _rank(x, count, keys, other, buckets):
    """Radix sort of (key, place) in 64 bits; `keys` then holds the places in order."""
    for i in range(count):
        bits = get_bits(x + i * 4)
        if bits == 1 << 31:
            bits = 0  # -0 equals 0
        # Negative numbers grow with falling bits; the largest number gets the smallest key.
        key = bits if bits >> 31 else 0x7FFFFFFF - bits
        put_int(keys + i * 8, key << 32 | i)
    for turn in range(3):
        shift = 32 + turn * _BITS
        for b in range(_BUCKETS):
            put_int(buckets + b * 8, 0)
        for i in range(count):
            at = buckets + (get_int(keys + i * 8) >> shift & _BUCKETS - 1) * 8
            put_int(at, get_int(at) + 1)
        start = 0
        for b in range(_BUCKETS):
            size = get_int(buckets + b * 8)
            put_int(buckets + b * 8, start)
            start += size
        for i in range(count):
            value = get_int(keys + i * 8)
            at = buckets + (value >> shift & _BUCKETS - 1) * 8
            put_int(other + get_int(at) * 8, value)
            put_int(at, get_int(at) + 1)
        keys, other = other, keys
    for i in range(count):
        put_int(other + i * 8, get_int(keys + i * 8) & 0xFFFFFFFF)


@ranked.twin("compiled", runs)
def _ranked(logits_V: Tensor) -> Tensor:
    if not plain(logits_V):
        return ranked.reference(logits_V)
    x, count = logits_V.contiguous(), logits_V.shape[0]
    keys = torch.empty(2, count, dtype=torch.int64)
    buckets = torch.empty(_BUCKETS, dtype=torch.int64)
    _rank(x.data_ptr(), count, keys[0].data_ptr(), keys[1].data_ptr(), buckets.data_ptr())
    # Three turns leave the order in the second half; the places are written to the first.
    return keys[0]
