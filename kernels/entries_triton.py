"""Write cache entries from Triton kernels, in the layouts of `entries`."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whalepod.kernels.entries import KV_BLOCK, Pages, Rounding, Storage, round_rows
from whalepod.kernels.jit import FIXED, INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import e2m1, e4m3, exponent_above, power, rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.quantise import FP4_GROUP

# Rows of a program that only rounds.
_ROWS = 4
_ROUNDINGS = {"none": 0, "kv": 1, "index": 2}


def layout(
    storage: Storage | None, kind: torch.dtype, size: int, pairs: int, rounding: Rounding
) -> dict[str, Any]:
    """Keyword arguments `dense`, `data`, `wide` and constants of a kernel that calls `put_rows`.

    Args:
        storage: where entries go, or None for nowhere.
        kind: dtype to which entries are rounded before they are quantised.
        size, pairs: dims of an entry, and rotated pairs at its end.
    """
    paged = isinstance(storage, Pages)
    data = storage.bytes if isinstance(storage, Pages) else None
    factor = torch.tensor(size**-0.5).to(kind).item()  # as `hadamard` has it in its matrix
    return {
        "dense": None if paged else storage,
        "data": data,
        "wide": None if data is None else data.view(torch.bfloat16),
        "STRIDE": 0 if data is None else data.stride(0),
        "COUNT": storage.count if isinstance(storage, Pages) else 1,
        "DATA": storage.data if isinstance(storage, Pages) else 0,
        "SCALES": storage.scales if isinstance(storage, Pages) else 0,
        "D": size,
        "PAIRS": pairs,
        "ROUNDING": _ROUNDINGS[rounding],
        "PAGED": paged,
        "KIND": tl.bfloat16 if kind == torch.bfloat16 else tl.float32,
        "FACTOR": factor,
        "CUTS": INTERPRETED,
        "WIDTH": max(KV_BLOCK if rounding == "kv" else FP4_GROUP, triton.next_power_of_2(size)),
    }


def flat(storage: Tensor | Pages) -> Tensor | Pages:
    """Rings `[N, W, D]` as flat rows; paged storage as it is."""
    return storage if isinstance(storage, Pages) else storage.view(-1, storage.shape[-1])


@jit
def hadamard_rows(value, FACTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Walsh-Hadamard rotation of rows in Sylvester's order; WIDTH is a power of two up to 1024."""
    for step in tl.static_range(10):
        if (1 << step) < WIDTH:  # takes the lowest bit of the index, and makes it the highest
            a, b = tl.split(tl.reshape(value, (ROWS, WIDTH // 2, 2)))
            value = tl.reshape(tl.trans(tl.join(a + b, a - b), 0, 2, 1), (ROWS, WIDTH))
    return value * FACTOR


@jit
def _grid(value, LIMIT: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Exponents `[ROWS, WIDTH // BLOCK]` of the blocks' scales, and the values over them."""
    cube = tl.reshape(value, (ROWS, WIDTH // BLOCK, BLOCK))
    amax = tl.maximum(tl.max(tl.abs(cube), 2), LEAST)
    exponent = exponent_above(amax * (1.0 / LIMIT))
    scaled = tl.reshape(cube * power(254 - exponent)[:, :, None], (ROWS, WIDTH))
    return exponent, scaled


@jit
def _again(code, exponent, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cube = tl.reshape(code, (ROWS, WIDTH // BLOCK, BLOCK)) * power(exponent)[:, :, None]
    return tl.reshape(cube, (ROWS, WIDTH))


@jit
def put_rows(
    value, row, live, dense, data, wide, STRIDE: tl.constexpr, COUNT: tl.constexpr,
    DATA: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    ROUNDING: tl.constexpr, PAGED: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr,
    CUTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round entries `[ROWS, WIDTH]` fp32 and write those that live; returns them rounded, fp32.

    Behind column D they are zero. With neither `dense` nor pages nothing is written.
    """
    PLAIN: tl.constexpr = D - 2 * PAIRS
    d = tl.arange(0, WIDTH)
    page, place = row // COUNT, row % COUNT
    at = page * STRIDE + place * DATA
    scales_at = page * STRIDE + COUNT * DATA + place * SCALES
    if ROUNDING == 1:
        inside = tl.where((d < PLAIN)[None, :], value, 0.0)
        exponent, scaled = _grid(inside, 448.0, 1e-4, ROWS, WIDTH, 64)
        code = e4m3(scaled)
        value = tl.where((d < PLAIN)[None, :], _again(code, exponent, ROWS, WIDTH, 64), value)
        if PAGED:
            g = tl.arange(0, WIDTH // 64)
            kept = live[:, None] & (d < PLAIN)[None, :]
            tl.store(
                data + at[:, None] + d[None, :],
                code.to(tl.float8e4nv).to(tl.uint8, bitcast=True),
                mask=kept,
            )
            kept = live[:, None] & ((d >= PLAIN) & (d < D))[None, :]
            tail = wide + (at // 2)[:, None] + (d - PLAIN + PLAIN // 2)[None, :]
            tl.store(tail, rounded(value, tl.bfloat16, CUTS), mask=kept)
            exponent = tl.where((g * 64 < PLAIN)[None, :], exponent, 0)
            kept = live[:, None] & (g < SCALES)[None, :]
            tl.store(data + scales_at[:, None] + g[None, :], exponent.to(tl.uint8), mask=kept)
    if ROUNDING == 2:
        value = rounded(hadamard_rows(value, FACTOR, ROWS, WIDTH), KIND, CUTS).to(tl.float32)
        exponent, scaled = _grid(value, 6.0, 7.052966104933725e-38, ROWS, WIDTH, 32)
        code = e2m1(scaled)
        size = code & 7
        step = tl.where(size < 2, size * 0.5, (1.0 + 0.5 * (size & 1)) * power((size >> 1) + 126))
        value = _again(tl.where(code < 8, step, -step), exponent, ROWS, WIDTH, 32)
        if PAGED:
            low, high = tl.split(tl.reshape(code, (ROWS, WIDTH // 2, 2)))
            byte, g = tl.arange(0, WIDTH // 2), tl.arange(0, WIDTH // 32)
            kept = live[:, None] & (byte < DATA)[None, :]
            tl.store(
                data + at[:, None] + byte[None, :], (low | (high << 4)).to(tl.uint8), mask=kept
            )
            kept = live[:, None] & (g < SCALES)[None, :]
            tl.store(data + scales_at[:, None] + g[None, :], exponent.to(tl.uint8), mask=kept)
    if dense is not None:
        kept = live[:, None] & (d < D)[None, :]
        out = rounded(value, dense.dtype.element_ty, CUTS)
        tl.store(dense + row[:, None] * D + d[None, :], out, mask=kept)
    return value


@jit
def _round_kernel(
    x, out, N, dense, data, wide, STRIDE: tl.constexpr, COUNT: tl.constexpr, DATA: tl.constexpr,
    SCALES: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROUNDING: tl.constexpr,
    PAGED: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr, CUTS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, WIDTH)
    kept = (row < N)[:, None] & (d < D)[None, :]
    value = tl.load(x + row[:, None] * D + d[None, :], mask=kept, other=0.0).to(tl.float32)
    value = put_rows(
        value, row, row < N, dense, data, wide, STRIDE, COUNT, DATA, SCALES, D, PAIRS, ROUNDING,
        PAGED, KIND, FACTOR, CUTS, ROWS, WIDTH,
    )  # fmt: skip
    tl.store(out + row[:, None] * D + d[None, :], rounded(value, KIND, CUTS), mask=kept)


@round_rows.twin("triton", runs)
def _round_rows(x: Tensor, rounding: Rounding, rotary: int = 0) -> Tensor:
    if rounding == "none":
        return x
    x, size = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // size
    if rows:
        _round_kernel[(triton.cdiv(rows, _ROWS),)](
            x, out, rows, ROWS=_ROWS, num_warps=1, **FIXED, **early(),
            **layout(None, x.dtype, size, rotary // 2, rounding),
        )  # fmt: skip
    return out
