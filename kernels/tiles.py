"""Products of blocks of rows whose sums stay in registers, for compiled CPU twins.

Every result is one chain of fused multiply-adds in the order of the inputs, however many rows or
columns are taken at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from whalepod.kernels import simd
from whalepod.kernels.simd import F32, I32, I64, LANES, VECTOR, Emit


def _number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _panels(columns: int, size: int) -> Emit:
    """Row k of a packed matrix: one vector of each of `columns` panels."""
    code = {1: simd.load_e5m2_code, 2: simd.load_bf16_code, 4: simd.load_code}[size]

    def read(builder: Any, w: Any, w_step: Any, k: Any) -> list[Any]:
        at = builder.add(w, builder.mul(k, _number(LANES * size)))
        places = [builder.add(at, builder.mul(w_step, _number(n))) for n in range(columns)]
        return [code(builder, place) for place in places]

    return read


def _listed(columns: int) -> Emit:
    """The vector at address k of a list, from a distance on: `columns` parts that lie in a row."""

    def read(builder: Any, w: Any, offset: Any, k: Any) -> list[Any]:
        at = builder.load(
            simd.pointer(builder, builder.add(w, builder.mul(k, _number(8)))), typ=I64
        )
        at = builder.add(at, offset)
        return [
            simd.load_code(builder, builder.add(at, _number(4 * LANES * n))) for n in range(columns)
        ]

    return read


def _block(builder: Any, size: tuple[int, int], read: Emit, args: tuple[Any, ...]) -> None:
    """Emit `y[m, n] = sum_k x[m, k] w[k, n]`, one chain of fused multiply-adds for each (m, n)."""
    rows, columns = size
    x, x_step, w, w_step, count, y, y_step, lanes = args
    entry = builder.block
    loop, after = (builder.append_basic_block(n) for n in ("tile.loop", "tile.end"))
    zero = ir.Constant(I64, 0)
    x_rows = [builder.add(x, builder.mul(x_step, ir.Constant(I64, m))) for m in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(zero, entry)
    sums = [[builder.phi(VECTOR) for _ in range(columns)] for _ in range(rows)]
    for row in sums:
        for s in row:
            s.add_incoming(simd.constant(0.0), entry)
    w_parts = read(builder, w, w_step, k)
    x_at = builder.mul(k, ir.Constant(I64, 4))
    made = []
    for m in range(rows):
        one = simd.splat_code(
            builder, builder.load(simd.pointer(builder, builder.add(x_rows[m], x_at)), typ=F32)
        )
        made.append([simd.fma_code(builder, one, w_parts[n], sums[m][n]) for n in range(columns)])
    following = builder.add(k, ir.Constant(I64, 1))
    k.add_incoming(following, builder.block)
    for row, new in zip(sums, made, strict=True):
        for s, value in zip(row, new, strict=True):
            s.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    for n in range(columns):
        mask = simd.first_lanes(builder, builder.sub(lanes, ir.Constant(I64, LANES * n)))
        for m in range(rows):
            place = builder.add(y, builder.mul(y_step, ir.Constant(I64, m)))
            place = builder.add(place, ir.Constant(I64, 4 * LANES * n))
            simd.store_masked(builder, place, made[m][n], mask)


def _typed_addresses(count: int, emit: Emit) -> tuple[Any, Callable[..., Any]]:
    return simd.typed(types.void(*[types.int64] * count), emit)


def _sweep(builder: Any, sizes: tuple[int, ...], columns: int, width: int, args: Any) -> None:
    """Emit loops over the rows of x, in tiles of falling size."""
    x, x_step, w, w_step, count, y, y_step, rows, lanes = args
    read, m, before = _panels(columns, width), _number(0), builder.block
    for size in sizes:
        test, body, following = (builder.append_basic_block(f"rows{size}") for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        at = builder.phi(I64)
        at.add_incoming(m, before)
        stop = builder.add(at, _number(size))
        builder.cbranch(builder.icmp_signed("<=", stop, rows), body, following)
        builder.position_at_end(body)
        x_at, y_at = (builder.add(a, builder.mul(at, b)) for a, b in ((x, x_step), (y, y_step)))
        place = (x_at, x_step, w, w_step, count, y_at, y_step, lanes)
        _block(builder, (size, columns), read, place)
        at.add_incoming(stop, builder.block)
        builder.branch(test)
        builder.position_at_end(following)
        m, before = at, test
        # `following` is entered from `test` alone, so the count of rows done is known there.
        before = following


def sweep(sizes: tuple[int, ...], columns: int, width: int) -> Any:
    """Make a function that multiplies rows by `columns` panels of a packed matrix.

    Its arguments: x, bytes between rows of x, the first panel, bytes between panels, the number of
    inputs (at least 1), y, bytes between rows of y, how many rows, and how many outputs to write. A
    panel holds `[inputs, 16]` numbers of `width` bytes: FP8 (E5M2), bf16 or fp32. So many rows are
    taken at a time as `sizes` says, which ends with 1; it changes no result.
    """

    def emit(builder: Any, *args: Any) -> None:
        _sweep(builder, sizes, columns, width, args)

    def typing(
        context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any
    ) -> Any:
        return _typed_addresses(9, emit)

    return intrinsic(typing)


def weighted(rows: int, columns: int) -> Any:
    """Make a function that adds up listed vectors, `rows` sums with weights of their own.

    Its arguments: the weights, bytes between their rows, a list of addresses, where in a vector to
    begin (bytes), how many vectors (at least 1), y, bytes between rows of y, and how many numbers
    of each row to write, at most `16 * columns`.
    """
    read = _listed(columns)

    def emit(builder: Any, *args: Any) -> None:
        _block(builder, (rows, columns), read, args)

    def typing(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return _typed_addresses(8, emit)

    return intrinsic(typing)


def products(rows: int, columns: int) -> Any:
    """Make a function that multiplies `rows` vectors by `columns` listed ones.

    Its arguments: the first vector, bytes between vectors, a list of addresses, the width in
    sixteens (at least 1), z, bytes between rows of z. Each product is a chain per lane, then a tree.
    """

    def emit(builder: Any, q: Any, q_step: Any, keys: Any, count: Any, z: Any, z_step: Any) -> None:
        entry = builder.block
        loop, after = (builder.append_basic_block(n) for n in ("dot.loop", "dot.end"))
        q_rows = [builder.add(q, builder.mul(q_step, _number(m))) for m in range(rows)]
        places = [
            builder.load(simd.pointer(builder, builder.add(keys, _number(8 * n))), typ=I64)
            for n in range(columns)
        ]
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(_number(0), entry)
        sums = [[builder.phi(VECTOR) for _ in range(columns)] for _ in range(rows)]
        at = builder.mul(k, _number(4 * LANES))
        ours = [simd.load_code(builder, builder.add(row, at)) for row in q_rows]
        theirs = [simd.load_code(builder, builder.add(place, at)) for place in places]
        following = builder.add(k, _number(1))
        made = []
        for m in range(rows):
            made.append(
                [simd.fma_code(builder, ours[m], theirs[n], sums[m][n]) for n in range(columns)]
            )
            for s, value in zip(sums[m], made[m], strict=True):
                s.add_incoming(simd.constant(0.0), entry)
                s.add_incoming(value, loop)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        for m in range(rows):
            for n in range(columns):
                one = simd.fold(builder, made[m][n], (8, 4, 2, 1), builder.fadd)
                place = builder.add(z, builder.mul(z_step, _number(m)))
                place = simd.pointer(builder, builder.add(place, _number(4 * n)))
                builder.store(builder.extract_element(one, ir.Constant(I32, 0)), place)

    def typing(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return _typed_addresses(6, emit)

    return intrinsic(typing)
