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

F32, I32, _I16, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
INTS = ir.VectorType(I32, LANES)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def constant(value: float) -> ir.Constant:
    """One number in every lane."""
    return ir.Constant(VECTOR, [value] * LANES)


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args)


def pointer(builder: Any, address: Any) -> Any:
    """An address as something to load from."""
    return builder.inttoptr(address, ir.PointerType())


def load_code(builder: Any, address: Any) -> Any:
    """Read a vector."""
    value = builder.load(pointer(builder, address), typ=VECTOR)
    value.align = 4
    return value


def load_bf16_code(builder: Any, address: Any) -> Any:
    """Read sixteen bf16 numbers."""
    half = builder.load(pointer(builder, address), typ=ir.VectorType(_I16, LANES))
    half.align = 2
    wide = builder.shl(builder.zext(half, INTS), ir.Constant(INTS, [16] * LANES))
    return builder.bitcast(wide, VECTOR)


def load_e5m2_code(builder: Any, address: Any) -> Any:
    """Read sixteen FP8 numbers with five bits of exponent: the upper halves of fp16 numbers."""
    byte = builder.load(pointer(builder, address), typ=ir.VectorType(ir.IntType(8), LANES))
    byte.align = 1
    narrow = ir.VectorType(_I16, LANES)
    wide = builder.shl(builder.zext(byte, narrow), ir.Constant(narrow, [8] * LANES))
    return builder.fpext(builder.bitcast(wide, ir.VectorType(ir.HalfType(), LANES)), VECTOR)


def splat_code(builder: Any, value: Any) -> Any:
    """One number in every lane."""
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTS, [0] * LANES)
    )


def fma_code(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return _call(builder, "llvm.fma.v16f32", VECTOR, [a, b, c])


def first_lanes(builder: Any, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    limit = builder.trunc(count, I32)
    one = builder.insert_element(ir.Constant(INTS, ir.Undefined), limit, ir.Constant(I32, 0))
    spread = builder.shuffle_vector(
        one, ir.Constant(INTS, ir.Undefined), ir.Constant(INTS, [0] * LANES)
    )
    return builder.icmp_signed("<", ir.Constant(INTS, list(range(LANES))), spread)


def store_masked(builder: Any, address: Any, value: Any, mask: Any) -> None:
    """Write the lanes that `mask` has."""
    args = [value, pointer(builder, address), ir.Constant(I32, 4), mask]
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)


Emit = Callable[..., Any]


def typed(signature: Any, emit: Emit) -> tuple[Any, Callable[..., Any]]:
    """Make what numba wants of an intrinsic: its type, and what emits it."""

    def code(context: Any, builder: Any, _: Any, values: Any) -> Any:
        made = emit(builder, *values)
        return context.get_dummy_value() if made is None else made

    return signature, code


def _one(result: Any, a_type: Any) -> Callable[[Emit], Any]:
    """Make an operation of one argument from what emits its instructions."""

    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any) -> Any:
            return typed(result(a_type), emit)

        return intrinsic(typing)

    return make


def _two(result: Any, a_type: Any, b_type: Any) -> Callable[[Emit], Any]:
    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any, b: Any) -> Any:
            return typed(result(a_type, b_type), emit)

        return intrinsic(typing)

    return make


def _three(result: Any, a_type: Any, b_type: Any, c_type: Any) -> Callable[[Emit], Any]:
    def make(emit: Emit) -> Any:
        def typing(context: Any, a: Any, b: Any, c: Any) -> Any:
            return typed(result(a_type, b_type, c_type), emit)

        return intrinsic(typing)

    return make


load = _one(vector, types.int64)(load_code)
load_bf16 = _one(vector, types.int64)(load_bf16_code)
load_e5m2 = _one(vector, types.int64)(load_e5m2_code)
splat = _one(vector, types.float32)(splat_code)
fma = _three(vector, vector, vector, vector)(fma_code)
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
    builder.store(value, pointer(builder, address)).align = 4


@_three(types.void, types.int64, vector, types.int64)
def store_first(builder: Any, address: Any, value: Any, count: Any) -> None:
    """Write the first `count` lanes."""
    store_masked(builder, address, value, first_lanes(builder, count))


@_one(types.float32, types.int64)
def get(builder: Any, address: Any) -> Any:
    """Read one number."""
    return builder.load(pointer(builder, address), typ=F32)


@_two(types.void, types.int64, types.float32)
def put(builder: Any, address: Any, value: Any) -> None:
    """Write one number."""
    builder.store(value, pointer(builder, address))


@_one(types.int64, types.int64)
def get_int(builder: Any, address: Any) -> Any:
    """Read one 64-bit integer."""
    return builder.load(pointer(builder, address), typ=I64)


@_one(types.int64, types.int64)
def get_bits(builder: Any, address: Any) -> Any:
    """Read the bits of one number."""
    return builder.zext(builder.load(pointer(builder, address), typ=I32), I64)


@_two(types.void, types.int64, types.int64)
def put_int(builder: Any, address: Any, value: Any) -> None:
    """Write one 64-bit integer."""
    builder.store(value, pointer(builder, address))


def _shuffle(builder: Any, x: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTS, lanes))


def fold(builder: Any, x: Any, steps: tuple[int, ...], join: Callable[[Any, Any], Any]) -> Any:
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
        fold(builder, x, (8, 4, 2, 1), builder.fadd), ir.Constant(I32, 0)
    )


@_one(types.float32, vector)
def largest(builder: Any, x: Any) -> Any:
    """The largest lane."""
    return builder.extract_element(
        fold(builder, x, (8, 4, 2, 1), _larger(builder)), ir.Constant(I32, 0)
    )


# A vector as a 4 x 4 matrix, row by row: sums of rows and columns, spread over their elements.
row_sums = _one(vector, vector)(lambda b, x: fold(b, x, (2, 1), b.fadd))
column_sums = _one(vector, vector)(lambda b, x: fold(b, x, (8, 4), b.fadd))
row_largest = _one(vector, vector)(lambda b, x: fold(b, x, (2, 1), _larger(b)))

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Cephes' polynomial of exp on [-ln 2 / 2, ln 2 / 2]; the error is below 2 units in the last place.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOWEST, _HIGHEST = -87.0, 88.0


def _exp(builder: Any, x: Any) -> Any:
    """`exp(x)` for `x <= 88`; below -87 (and for -inf) 0, and NaN of a NaN."""
    nan, given = builder.fcmp_unordered("uno", x, x), x
    tiny = builder.fcmp_unordered(
        "<", x, constant(_LOWEST)
    )  # a NaN, too: what is made an integer is a number
    x = builder.select(tiny, constant(_LOWEST), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(_HIGHEST)), constant(_HIGHEST), x)
    n = _call(builder, "llvm.rint.v16f32", VECTOR, [builder.fmul(x, constant(_LOG2E))])
    r = fma_code(builder, n, constant(-_LN2_HIGH), x)
    r = fma_code(builder, n, constant(-_LN2_LOW), r)
    p = constant(_EXP[0])
    for c in _EXP[1:]:
        p = fma_code(builder, p, r, constant(c))
    p = builder.fadd(fma_code(builder, p, builder.fmul(r, r), r), constant(1.0))
    power = builder.shl(
        builder.add(builder.fptosi(n, INTS), ir.Constant(INTS, [127] * LANES)),
        ir.Constant(INTS, [23] * LANES),
    )
    made = builder.select(tiny, constant(0.0), builder.fmul(p, builder.bitcast(power, VECTOR)))
    return builder.select(nan, given, made)


exp = _one(vector, vector)(_exp)


def _turned(sign: float) -> Emit:
    """Multiply pairs (real, imaginary) by others, or by their conjugates with sign -1."""

    def emit(builder: Any, x: Any, turn: Any) -> Any:
        cosine = _shuffle(builder, turn, [lane & ~1 for lane in range(LANES)])
        sine = _shuffle(builder, turn, [lane | 1 for lane in range(LANES)])
        sine = builder.fmul(sine, ir.Constant(VECTOR, [-sign, sign] * (LANES // 2)))
        other = _shuffle(builder, x, [lane ^ 1 for lane in range(LANES)])
        return fma_code(builder, x, cosine, builder.fmul(other, sine))

    return emit


rotate = _two(vector, vector, vector)(_turned(1.0))
rotate_back = _two(vector, vector, vector)(_turned(-1.0))
