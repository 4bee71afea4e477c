"""Roundings to narrow formats inside Triton kernels, the same in its interpreter."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from whalepod.kernels.jit import jit, tl


@jit
def rounded(value, kind: tl.constexpr, CUTS: tl.constexpr):
    """fp32 to `kind`, to the nearest; Triton's interpreter cuts a bf16 off instead (CUTS)."""
    if CUTS and kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(kind)


@jit
def clamped(x, low, high):
    """`x` between two bounds; a NaN stays one, which a minimum would make a bound of."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def exponent_above(x):
    """Biased exponent of the smallest power of two that is at least `x` (> 0)."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)


@jit
def power(exponent):
    """fp32 power of two of a biased exponent (1 to 254)."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def e4m3(value):
    """Nearest E4M3 value of fp32, ties to even, after a clamp to +-448; still fp32, so it converts exactly.

    Adding a power of two whose last bit is the grid's step makes the sum round to it.
    """
    size = clamped(tl.abs(value), 0.0, 448.0)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)
    magic = power(exponent + 20) * 1.5
    bits = ((magic + size) - magic).to(tl.int32, bitcast=True)
    sign = value.to(tl.int32, bitcast=True) & -(2**31)
    return (bits | sign).to(tl.float32, bitcast=True)


@jit
def e2m1(value):
    """Code of the nearest E2M1 of fp32, ties to even, after a clamp to +-6; bit 3 is the sign."""
    size = tl.minimum(tl.abs(value), 6.0)
    # Steps of 0.5 below 2, of 1 below 4, of 2 above; half-way cases go to the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
    code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    return code + 8 * (value < 0).to(tl.int32)
