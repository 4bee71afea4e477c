"""Triton source of `fp4_experts`: see there and in `fp4.py` for the layouts.

A program computes a tile of outputs for the rows of one block of the route (`route.py`): N outputs by
M rows, so the decoded weights are the first operand of the product and stay in registers, and few rows
waste little. A tile of the first launch is half gate rows, half the same up rows. A sum runs over K in blocks of 128, in each over four groups of 32, whatever the tiles
are: a row's bits do not depend on them.
"""

from __future__ import annotations

from whalepod.kernels.jit import jit, tl
from whalepod.kernels.narrow import clamped, rounded
from whalepod.kernels.overlap import begin


@jit
def _spread(words, scales, GROUP: tl.constexpr):
    """One group of `decode_words` in plain operations, fp32; a half of a word is half of a bf16 pair."""
    whole = tl.reshape(words, (words.shape[0], words.shape[1] // 2, 2))
    even, odd = tl.split(whole)
    word = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
    if GROUP == 0:
        bits = word
    elif GROUP == 1:
        bits = word << 4
    elif GROUP == 2:
        bits = (word << 26) | ((word >> 6) & 0x03FFFFFF)
    else:
        bits = ((word << 6) & -0x7F3F7F40) | ((word >> 2) & 0x01000100)
    bits = bits & -0x7E3F7E40  # as in the inline assembly, signed
    both = tl.reshape(tl.join(bits << 16, bits & ~0xFFFF), words.shape)
    factor = ((scales >> (8 * GROUP)) & 0xFF) << 23
    return both.to(tl.float32, bitcast=True) * factor.to(tl.float32, bitcast=True)


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
            shl.b32 t, $4, 4;
            and.b32 $1, t, 0x81C081C0;
            prmt.b32 f, $5, 0, 0x4141;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $1, $1, f;
            shf.l.wrap.b32 t, $4, $4, 26;
            and.b32 $2, t, 0x81C081C0;
            prmt.b32 f, $5, 0, 0x4242;
            shl.b32 f, f, 7;
            mul.rn.bf16x2 $2, $2, f;
            shl.b32 t, $4, 6;
            and.b32 t, t, 0x80C080C0;
            shr.u32 u, $4, 2;
            and.b32 u, u, 0x01000100;
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
def _products(
    x, codes, scales, live, STEP: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`[BN, BM]`: rows of a matrix, at `codes` and `scales`, with the inputs whose rows start at `x`.

    STEP is the number of the matrix's rows: how far apart two blocks of columns are.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, (COLUMNS + 127) // 128 * 128, 128):
        words = tl.load(codes[:, None] + tl.arange(0, 32)[None, :])
        factors = tl.load(scales)
        x0, x1 = _inputs(x, k, live, COLUMNS, EXACT), _inputs(x, k + 32, live, COLUMNS, EXACT)
        x2, x3 = _inputs(x, k + 64, live, COLUMNS, EXACT), _inputs(x, k + 96, live, COLUMNS, EXACT)
        a, b, c, d = decode_words(words, factors, EXACT)
        acc = tl.dot(a, x0, acc, input_precision="ieee")
        acc = tl.dot(b, x1, acc, input_precision="ieee")
        acc = tl.dot(c, x2, acc, input_precision="ieee")
        acc = tl.dot(d, x3, acc, input_precision="ieee")
        codes += STEP * 32
        scales += STEP
    return acc


@jit
def _block(
    order, slots, starts, stops, used, block, EXPERTS: tl.constexpr, LEAST: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Whether to compute a block, its slot, the places of its rows, which of them are real, their pairs.

    Other launches compute blocks of at most LEAST rows and of more than BM. With EXPERTS it is about one
    token: blocks are its pairs, `slots` the ids of their experts, and `order` says where each expert lies.
    """
    if EXPERTS > 0:
        expert = tl.load(slots + block)
        inside = (expert >= 0) & (expert < EXPERTS)
        slot = tl.load(order + tl.where(inside, expert, 0), mask=inside, other=-1)
        row = block + tl.arange(0, BM)
        ours, at, live = block >= 0, row, row == block
    else:
        exist, slot = tl.load(used), tl.load(slots + block)  # at once: each waits for the memory
        start, stop = tl.load(starts + block), tl.load(stops + block)
        at = start + tl.arange(0, BM)
        live = at < stop
        ours = (block < exist) & (stop - start > LEAST) & (stop - start <= BM)
        row = tl.load(order + at, mask=live & ours, other=0)
    return ours, slot.to(tl.int64), at, live, row


@jit
def gate_up_kernel(
    x, codes, scales, gain, weights, order, slots, starts, stops, used, inner,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, LEAST: tl.constexpr,
    EXPERTS: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr = False,
    ALONGSIDE: tl.constexpr = False,
):  # fmt: skip
    """Weighted SwiGLU of a block's rows for half a tile of columns, to their places in the route."""
    begin(EARLY, ALONGSIDE)
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    ours, slot, at, live, row = _block(order, slots, starts, stops, used, block, EXPERTS, LEAST, BM)
    if (not ours) | (slot < 0):
        return
    HALF: tl.constexpr = BN // 2
    first = slot * ((COLUMNS + 127) // 128 * 2 * WIDTH)
    i = tl.arange(0, BN)
    near = first + tl.minimum(tile * HALF + i % HALF, WIDTH - 1) + i // HALF * WIDTH
    x += (row // TOP).to(tl.int64) * COLUMNS
    acc = _products(x, codes + near * 32, scales + near, live, 2 * WIDTH, COLUMNS, BN, BM, EXACT)
    kind = inner.dtype.element_ty
    acc = rounded(acc * tl.load(gain + slot), kind, EXACT).to(tl.float32)
    gate, up = tl.split(tl.permute(tl.reshape(acc, (2, HALF, BM)), (1, 2, 0)))
    gate, up = clamped(gate, float("-inf"), LIMIT), clamped(up, -LIMIT, LIMIT)
    small = tl.exp(-tl.abs(gate))  # of the sigmoid: never infinite
    out = gate * (tl.where(gate < 0, small, 1.0) / (1.0 + small)) * up
    out *= tl.load(weights + row, mask=live, other=0.0)[None, :]
    n = tile * HALF + tl.arange(0, HALF)
    where = inner + at.to(tl.int64)[None, :] * WIDTH + n[:, None]
    tl.store(where, rounded(out, kind, EXACT), mask=live[None, :] & (n < WIDTH)[:, None])


@jit
def down_kernel(
    inner, codes, scales, gain, order, slots, starts, stops, used, out,
    D: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, LEAST: tl.constexpr,
    EXPERTS: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr = False,
    ALONGSIDE: tl.constexpr = False,
):  # fmt: skip
    """A tile of columns of a block's outputs, to their pairs' rows; zeros for absent experts."""
    begin(EARLY, ALONGSIDE)
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    ours, slot, at, live, row = _block(order, slots, starts, stops, used, block, EXPERTS, LEAST, BM)
    if not ours:
        return
    n = tile * BN + tl.arange(0, BN)
    where = out + row.to(tl.int64)[None, :] * D + n[:, None]
    kept = live[None, :] & (n < D)[:, None]
    kind = out.dtype.element_ty
    if slot < 0:
        tl.store(where, tl.zeros((BN, BM), kind), mask=kept)
        return
    near = slot * ((COLUMNS + 127) // 128 * D) + tl.minimum(n, D - 1)
    inner += at.to(tl.int64) * COLUMNS
    acc = _products(inner, codes + near * 32, scales + near, live, D, COLUMNS, BN, BM, EXACT)
    tl.store(where, rounded(acc * tl.load(gain + slot), kind, EXACT), mask=kept)
