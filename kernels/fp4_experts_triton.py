"""Triton source of `fp4_experts`: see there and in `fp4.py` for the layouts.

A program computes a tile of outputs for the rows of one block of the route (`route.py`): N outputs by
M rows, so the decoded weights are the first operand of the product and stay in registers, and few rows
waste little. A sum runs over K in blocks of 128, in each over four groups of 32, whatever the tiles
are: a row's bits do not depend on them.
"""

from __future__ import annotations

from whalepod.kernels.jit import jit, tl


@jit
def _spread(words, scales, GROUP: tl.constexpr):
    """One group of `decode_words` in plain operations, fp32."""
    word = words.to(tl.int32)
    if GROUP == 3:
        low = ((word >> 3) & 0x0180) | ((word >> 7) & 0x0040)
        bits = ((word << 1) & 0x8000) | low
    else:
        bits = (word << (3 * GROUP)) & 0x81C0
    factor = ((scales >> (8 * GROUP)) & 0xFF) << 23
    return (bits << 16).to(tl.float32, bitcast=True) * factor.to(tl.float32, bitcast=True)


@jit
def decode_words(words, scales, EXACT: tl.constexpr):
    """Words `[N, 32]` int16 and scales `[N]` int32 to four groups `[N, 32]`, bf16 or fp32 (EXACT)."""
    each = tl.broadcast_to(scales[:, None], words.shape)
    if EXACT:
        a, b = _spread(words, each, 0), _spread(words, each, 1)
        c, d = _spread(words, each, 2), _spread(words, each, 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 f, t, u;
            and.b32 $0, $4, 0x81C081C0;
            prmt.b32 f, $5, 0, 0x4040;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $0, $0, f;
            shl.b32 t, $4, 3;
            and.b32 $1, t, 0x81C081C0;
            prmt.b32 f, $5, 0, 0x4141;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $1, $1, f;
            shl.b32 t, $4, 6;
            and.b32 $2, t, 0x81C081C0;
            prmt.b32 f, $5, 0, 0x4242;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $2, $2, f;
            shl.b32 t, $4, 1;
            and.b32 t, t, 0x80008000;
            shr.u32 u, $4, 3;
            and.b32 u, u, 0x01800180;
            or.b32 t, t, u;
            shr.u32 u, $4, 7;
            and.b32 u, u, 0x00400040;
            or.b32 $3, t, u;
            prmt.b32 f, $5, 0, 0x4343;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $3, $3, f;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r",
            args=[words, each],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@jit
def rounded(value, kind: tl.constexpr, CUTS: tl.constexpr):
    """fp32 to `kind`, to the nearest; Triton's interpreter cuts a bf16 off instead (CUTS)."""
    if CUTS and kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(kind)


@jit
def _inputs(x, k, live, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """`[32, M]` of the inputs whose rows start at `x`, from column k on."""
    column = k + tl.arange(0, 32)
    kept = live[None, :]
    if COLUMNS % 128 != 0:
        kept = kept & (column < COLUMNS)[:, None]
    value = tl.load(x[None, :] + column[:, None], mask=kept, other=0.0)
    if EXACT:
        value = value.to(tl.float32)
    return value


@jit
def _product(acc, codes, scales, x0, x1, x2, x3, EXACT: tl.constexpr):
    """Add one block of 128 columns: codes and scales point at the tile's first word and rows."""
    words = tl.load(codes[:, None] + tl.arange(0, 32)[None, :])
    a, b, c, d = decode_words(words, tl.load(scales), EXACT)
    acc = tl.dot(a, x0, acc, input_precision="ieee")
    acc = tl.dot(b, x1, acc, input_precision="ieee")
    acc = tl.dot(c, x2, acc, input_precision="ieee")
    return tl.dot(d, x3, acc, input_precision="ieee")


@jit
def gate_up_kernel(
    x, codes, scales, gain, order, weights, slots, starts, stops, used, inner,
    I: tl.constexpr, COLUMNS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    if block >= tl.load(used):
        return
    slot = tl.load(slots + block)
    if slot < 0:
        return
    at = tl.load(starts + block) + tl.arange(0, BM)
    live = at < tl.load(stops + block)
    row = tl.load(order + at, mask=live, other=0)
    x += (row // TOP).to(tl.int64) * COLUMNS
    BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    n = tile * BN + tl.arange(0, BN)
    near = tl.minimum(n, I - 1)
    scales += slot.to(tl.int64) * BLOCKS * 2 * I + near
    codes += (slot.to(tl.int64) * BLOCKS * 2 * I + near) * 32
    gate, up = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    for k in range(0, BLOCKS * 128, 128):
        x0, x1 = _inputs(x, k, live, COLUMNS, EXACT), _inputs(x, k + 32, live, COLUMNS, EXACT)
        x2, x3 = _inputs(x, k + 64, live, COLUMNS, EXACT), _inputs(x, k + 96, live, COLUMNS, EXACT)
        gate = _product(gate, codes, scales, x0, x1, x2, x3, EXACT)
        up = _product(up, codes + I * 32, scales + I, x0, x1, x2, x3, EXACT)
        codes += 2 * I * 32
        scales += 2 * I
    factor = tl.load(gain + slot)
    kind = inner.dtype.element_ty
    g = tl.minimum(rounded(gate * factor, kind, EXACT).to(tl.float32), LIMIT)
    u = tl.minimum(tl.maximum(rounded(up * factor, kind, EXACT).to(tl.float32), -LIMIT), LIMIT)
    small = tl.exp(-tl.abs(g))  # of the sigmoid: never infinite
    out = g * (tl.where(g < 0, small, 1.0) / (1.0 + small)) * u
    out *= tl.load(weights + row, mask=live, other=0.0)[None, :]
    where = inner + at.to(tl.int64)[None, :] * I + n[:, None]
    tl.store(where, rounded(out, kind, EXACT), mask=live[None, :] & (n < I)[:, None])


@jit
def down_kernel(
    inner, codes, scales, gain, order, slots, starts, stops, used, out,
    D: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    if block >= tl.load(used):
        return
    slot = tl.load(slots + block)
    at = tl.load(starts + block) + tl.arange(0, BM)
    live = at < tl.load(stops + block)
    row = tl.load(order + at, mask=live, other=0)
    n = tile * BN + tl.arange(0, BN)
    where = out + row.to(tl.int64)[None, :] * D + n[:, None]
    kept = live[None, :] & (n < D)[:, None]
    kind = out.dtype.element_ty
    if slot < 0:
        tl.store(where, tl.zeros((BN, BM), kind), mask=kept)
        return
    inner += at.to(tl.int64) * COLUMNS
    BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    near = tl.minimum(n, D - 1)
    scales += slot.to(tl.int64) * BLOCKS * D + near
    codes += (slot.to(tl.int64) * BLOCKS * D + near) * 32
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, BLOCKS * 128, 128):
        x0, x1 = _inputs(inner, k, live, COLUMNS, EXACT), _inputs(inner, k + 32, live, COLUMNS, EXACT)
        x2, x3 = _inputs(inner, k + 64, live, COLUMNS, EXACT), _inputs(inner, k + 96, live, COLUMNS, EXACT)
        acc = _product(acc, codes, scales, x0, x1, x2, x3, EXACT)
        codes += D * 32
        scales += D
    tl.store(where, rounded(acc * tl.load(gain + slot), kind, EXACT), mask=kept)
