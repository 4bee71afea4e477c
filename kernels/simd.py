"""Sixteen fp32 numbers at a time, for compiled CPU twins: explicit vectors, explicit order of sums.

A compiler that may not reorder sums does not vectorise them, and one that may chooses the order by
itself. These few operations fix both: what a function computes is the same on every CPU, whether it
has vectors of 128, 256 or 512 bits, as long as it has fused multiply-add.

Addresses are integers (`tensor.data_ptr()`), so that a compiled function has one signature. Every
name here can be used inside functions made by `kernels.compiled.compiled` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32, _I32, _I16, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_V = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _V)


def constant(value: float) -> ir.Constant:
    """One number in every lane."""
    return ir.Constant(_V, [value] * LANES)


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType())


def _load(builder: Any, address: Any) -> Any:
    value = builder.load(_at(builder, address), typ=_V)
    value.align = 4
    return value


def _load_bf16(builder: Any, address: Any) -> Any:
    half = builder.load(_at(builder, address), typ=ir.VectorType(_I16, LANES))
    half.align = 2
    wide = builder.shl(builder.zext(half, _VI), ir.Constant(_VI, [16] * LANES))
    return builder.bitcast(wide, _V)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_V, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(_V, ir.Undefined), ir.Constant(_VI, [0] * LANES)
    )


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _V, [a, b, c])


def _first(builder: Any, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    limit = builder.trunc(count, _I32)
    one = builder.insert_element(ir.Constant(_VI, ir.Undefined), limit, ir.Constant(_I32, 0))
    spread = builder.shuffle_vector(
        one, ir.Constant(_VI, ir.Undefined), ir.Constant(_VI, [0] * LANES)
    )
    return builder.icmp_signed("<", ir.Constant(_VI, list(range(LANES))), spread)


def _store_masked(builder: Any, address: Any, value: Any, mask: Any) -> None:
    args = [value, _at(builder, address), ir.Constant(_I32, 4), mask]
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)


Emit = Callable[..., Any]


def _typed(signature: Any, emit: Emit) -> tuple[Any, Callable[..., Any]]:
    def code(context: Any, builder: Any, _: Any, values: Any) -> Any:
        made = emit(builder, *values)
        return context.get_dummy_value() if made is None else made

    return signature, code


def _one(result: Any, a_type: Any) -> Callable[[Emit], Any]:
    """Make an operation of one argument from what emits its instructions."""

    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any) -> Any:
            return _typed(result(a_type), emit)

        return intrinsic(typing)

    return make


def _two(result: Any, a_type: Any, b_type: Any) -> Callable[[Emit], Any]:
    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any, b: Any) -> Any:
            return _typed(result(a_type, b_type), emit)

        return intrinsic(typing)

    return make


def _three(result: Any, a_type: Any, b_type: Any, c_type: Any) -> Callable[[Emit], Any]:
    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any, b: Any, c: Any) -> Any:
            return _typed(result(a_type, b_type, c_type), emit)

        return intrinsic(typing)

    return make


load = _one(vector, types.int64)(_load)
load_bf16 = _one(vector, types.int64)(_load_bf16)
splat = _one(vector, types.float32)(_splat)
fma = _three(vector, vector, vector, vector)(_fma)
add = _two(vector, vector, vector)(lambda b, x, y: b.fadd(x, y))
sub = _two(vector, vector, vector)(lambda b, x, y: b.fsub(x, y))
mul = _two(vector, vector, vector)(lambda b, x, y: b.fmul(x, y))
div = _two(vector, vector, vector)(lambda b, x, y: b.fdiv(x, y))
# A NaN in x or y gives y in both.
least = _two(vector, vector, vector)(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
most = _two(vector, vector, vector)(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@_two(types.void, types.int64, vector)
def store(builder: Any, address: Any, value: Any) -> None:
    """Write a vector."""
    builder.store(value, _at(builder, address)).align = 4


@_three(types.void, types.int64, vector, types.int64)
def store_first(builder: Any, address: Any, value: Any, count: Any) -> None:
    """Write the first `count` lanes."""
    _store_masked(builder, address, value, _first(builder, count))


@_one(types.float32, types.int64)
def get(builder: Any, address: Any) -> Any:
    """Read one number."""
    return builder.load(_at(builder, address), typ=_F32)


@_two(types.void, types.int64, types.float32)
def put(builder: Any, address: Any, value: Any) -> None:
    """Write one number."""
    builder.store(value, _at(builder, address))


@_one(types.int64, types.int64)
def get_int(builder: Any, address: Any) -> Any:
    """Read one 64-bit integer."""
    return builder.load(_at(builder, address), typ=_I64)


@_two(types.void, types.int64, types.int64)
def put_int(builder: Any, address: Any, value: Any) -> None:
    """Write one 64-bit integer."""
    builder.store(value, _at(builder, address))


def _shuffle(builder: Any, x: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, ir.Constant(_V, ir.Undefined), ir.Constant(_VI, lanes))


def _fold(builder: Any, x: Any, steps: tuple[int, ...], join: Callable[[Any, Any], Any]) -> Any:
    """Join every lane with those at these distances (powers of two), one after the other."""
    for step in steps:
        x = join(x, _shuffle(builder, x, [lane ^ step for lane in range(LANES)]))
    return x


def _larger(builder: Any) -> Callable[[Any, Any], Any]:
    return lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y)


@_one(types.float32, vector)
def total(builder: Any, x: Any) -> Any:
    """Sum of the lanes, as a tree: halves, quarters, eighths, pairs."""
    return builder.extract_element(
        _fold(builder, x, (8, 4, 2, 1), builder.fadd), ir.Constant(_I32, 0)
    )


@_one(types.float32, vector)
def largest(builder: Any, x: Any) -> Any:
    """The largest lane."""
    return builder.extract_element(
        _fold(builder, x, (8, 4, 2, 1), _larger(builder)), ir.Constant(_I32, 0)
    )


# A vector as a 4 x 4 matrix, row by row: sums of rows and columns, spread over their elements.
row_sums = _one(vector, vector)(lambda b, x: _fold(b, x, (2, 1), b.fadd))
column_sums = _one(vector, vector)(lambda b, x: _fold(b, x, (8, 4), b.fadd))
row_largest = _one(vector, vector)(lambda b, x: _fold(b, x, (2, 1), _larger(b)))

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Cephes' polynomial of exp on [-ln 2 / 2, ln 2 / 2]; the error is below 2 units in the last place.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOWEST, _HIGHEST = -87.0, 88.0


def _exp(builder: Any, x: Any) -> Any:
    """`exp(x)` for `x <= 88`; below -87 (and for -inf) 0."""
    tiny = builder.fcmp_unordered("<", x, constant(_LOWEST))
    x = builder.select(tiny, constant(_LOWEST), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(_HIGHEST)), constant(_HIGHEST), x)
    n = _call(builder, "llvm.rint.v16f32", _V, [builder.fmul(x, constant(_LOG2E))])
    r = _fma(builder, n, constant(-_LN2_HIGH), x)
    r = _fma(builder, n, constant(-_LN2_LOW), r)
    p = constant(_EXP[0])
    for c in _EXP[1:]:
        p = _fma(builder, p, r, constant(c))
    p = builder.fadd(_fma(builder, p, builder.fmul(r, r), r), constant(1.0))
    power = builder.shl(
        builder.add(builder.fptosi(n, _VI), ir.Constant(_VI, [127] * LANES)),
        ir.Constant(_VI, [23] * LANES),
    )
    return builder.select(tiny, constant(0.0), builder.fmul(p, builder.bitcast(power, _V)))


exp = _one(vector, vector)(_exp)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _panels(columns: int, half: bool) -> Emit:
    """Row k of a packed matrix: one vector of each of `columns` panels."""

    def read(builder: Any, w: Any, w_step: Any, k: Any) -> list[Any]:
        at = builder.add(w, builder.mul(k, _number(LANES * (2 if half else 4))))
        places = [builder.add(at, builder.mul(w_step, _number(n))) for n in range(columns)]
        return [(_load_bf16 if half else _load)(builder, place) for place in places]

    return read


def _listed(columns: int) -> Emit:
    """The vector at address k of a list, from a distance on: `columns` parts that lie in a row."""

    def read(builder: Any, w: Any, offset: Any, k: Any) -> list[Any]:
        at = builder.load(_at(builder, builder.add(w, builder.mul(k, _number(8)))), typ=_I64)
        at = builder.add(at, offset)
        return [_load(builder, builder.add(at, _number(4 * LANES * n))) for n in range(columns)]

    return read


def _block(builder: Any, size: tuple[int, int], read: Emit, args: tuple[Any, ...]) -> None:
    """Emit `y[m, n] = sum_k x[m, k] w[k, n]`, one chain of fused multiply-adds for each (m, n)."""
    rows, columns = size
    x, x_step, w, w_step, count, y, y_step, lanes = args
    entry = builder.block
    loop, after = (builder.append_basic_block(n) for n in ("tile.loop", "tile.end"))
    zero = ir.Constant(_I64, 0)
    x_rows = [builder.add(x, builder.mul(x_step, ir.Constant(_I64, m))) for m in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    k.add_incoming(zero, entry)
    sums = [[builder.phi(_V) for _ in range(columns)] for _ in range(rows)]
    for row in sums:
        for s in row:
            s.add_incoming(constant(0.0), entry)
    w_parts = read(builder, w, w_step, k)
    x_at = builder.mul(k, ir.Constant(_I64, 4))
    made = []
    for m in range(rows):
        one = _splat(builder, builder.load(_at(builder, builder.add(x_rows[m], x_at)), typ=_F32))
        made.append([_fma(builder, one, w_parts[n], sums[m][n]) for n in range(columns)])
    following = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(following, builder.block)
    for row, new in zip(sums, made, strict=True):
        for s, value in zip(row, new, strict=True):
            s.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    for n in range(columns):
        mask = _first(builder, builder.sub(lanes, ir.Constant(_I64, LANES * n)))
        for m in range(rows):
            place = builder.add(y, builder.mul(y_step, ir.Constant(_I64, m)))
            place = builder.add(place, ir.Constant(_I64, 4 * LANES * n))
            _store_masked(builder, place, made[m][n], mask)


def _typed_addresses(count: int, emit: Emit) -> tuple[Any, Callable[..., Any]]:
    return _typed(types.void(*[types.int64] * count), emit)


def _sweep(builder: Any, sizes: tuple[int, ...], columns: int, half: bool, args: Any) -> None:
    """Emit loops over the rows of x, in tiles of falling size."""
    x, x_step, w, w_step, count, y, y_step, rows, lanes = args
    read, m, before = _panels(columns, half), _number(0), builder.block
    for size in sizes:
        test, body, following = (builder.append_basic_block(f"rows{size}") for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        at = builder.phi(_I64)
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


def sweep(sizes: tuple[int, ...], columns: int, half: bool) -> Any:
    """Make a function that multiplies rows by `columns` panels of a packed matrix.

    Its arguments: x, bytes between rows of x, the first panel, bytes between panels, the number of
    inputs (at least 1), y, bytes between rows of y, how many rows, and how many outputs to write. A
    panel holds `[inputs, 16]` numbers: bf16 with `half`, else fp32. So many rows are taken at a
    time as `sizes` says, which ends with 1; it changes no result.
    """

    def emit(builder: Any, *args: Any) -> None:
        _sweep(builder, sizes, columns, half, args)

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

    def typing(
        context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
    ) -> Any:
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
            builder.load(_at(builder, builder.add(keys, _number(8 * n))), typ=_I64)
            for n in range(columns)
        ]
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(_number(0), entry)
        sums = [[builder.phi(_V) for _ in range(columns)] for _ in range(rows)]
        at = builder.mul(k, _number(4 * LANES))
        ours = [_load(builder, builder.add(row, at)) for row in q_rows]
        theirs = [_load(builder, builder.add(place, at)) for place in places]
        following = builder.add(k, _number(1))
        made = []
        for m in range(rows):
            made.append([_fma(builder, ours[m], theirs[n], sums[m][n]) for n in range(columns)])
            for s, value in zip(sums[m], made[m], strict=True):
                s.add_incoming(constant(0.0), entry)
                s.add_incoming(value, loop)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        for m in range(rows):
            for n in range(columns):
                one = _fold(builder, made[m][n], (8, 4, 2, 1), builder.fadd)
                place = builder.add(z, builder.mul(z_step, _number(m)))
                place = _at(builder, builder.add(place, _number(4 * n)))
                builder.store(builder.extract_element(one, ir.Constant(_I32, 0)), place)

    def typing(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return _typed_addresses(6, emit)

    return intrinsic(typing)


def _turned(sign: float) -> Emit:
    """Multiply pairs (real, imaginary) by others, or by their conjugates with sign -1."""

    def emit(builder: Any, x: Any, turn: Any) -> Any:
        cosine = _shuffle(builder, turn, [lane & ~1 for lane in range(LANES)])
        sine = _shuffle(builder, turn, [lane | 1 for lane in range(LANES)])
        sine = builder.fmul(sine, ir.Constant(_V, [-sign, sign] * (LANES // 2)))
        other = _shuffle(builder, x, [lane ^ 1 for lane in range(LANES)])
        return _fma(builder, x, cosine, builder.fmul(other, sine))

    return emit


rotate = _two(vector, vector, vector)(_turned(1.0))
rotate_back = _two(vector, vector, vector)(_turned(-1.0))
