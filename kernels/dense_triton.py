"""Triton source of products with dense matrices: `fp8_linear`, `linear` in bf16, the gate's scores.

A program computes N outputs by M rows, the weights being the first operand, so few rows waste little.
K is cut into blocks of 128 and these into chunks whose borders depend on the matrix alone: a chunk is
summed in order of K, then the chunks are added in order. With few rows the chunks are computed by
programs of their own (APART). With very few, the last of a tile's programs to finish adds them (JOIN); it
knows by a counter that it leaves at zero again. With some more, where one program would add for long,
`sum_kernel` does. With many rows a program does them one after the other. All give the same bits.

KIND is what a block's step does:
  "fp8":   words of two E4M3 codes, widened to bf16 in registers (see `fp8_linear.py`), bf16 inputs;
  "quant": E4M3 codes of weights and inputs, each block's product times both scales in fp32;
  "bf16":  plain `[N, K]` weights and inputs of one dtype.
"""

from __future__ import annotations

from whalepod.kernels.jit import jit, tl
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin

# Two words to the bf16 values of their low bytes, times the third operand; and of their high ones.
LOW_TO_BF16 = tl.constexpr(
    """
    {
    .reg .b32 f, t, u;
    prmt.b32 f, $2, 0, 0x1010;
    shl.b32 t, $1, 8;
    and.b32 t, t, 0x80008000;
    shl.b32 u, $1, 4;
    and.b32 u, u, 0x07F007F0;
    or.b32 t, t, u;
    mul.rn.bf16x2 $0, t, f;
    }
    """
)
HIGH_TO_BF16 = tl.constexpr(
    """
    {
    .reg .b32 f, t, u;
    prmt.b32 f, $2, 0, 0x1010;
    and.b32 t, $1, 0x80008000;
    shr.u32 u, $1, 4;
    and.b32 u, u, 0x07F007F0;
    or.b32 t, t, u;
    mul.rn.bf16x2 $0, t, f;
    }
    """
)


@jit
def widen_words(words, factor, EXACT: tl.constexpr):
    """Words `[N, 64]` int16 to the E4M3 values of their low and high bytes, times `2^-120 * factor`.

    `factor` `[N]` fp32 holds powers of two; results are bf16, fp32 if EXACT. A code's 7 bits of
    exponent and mantissa shifted into a bf16 number are the code's value times 2^-120.
    """
    each = tl.broadcast_to((factor.to(tl.int32, bitcast=True) >> 16)[:, None], words.shape)
    if EXACT:
        word = words.to(tl.int32)
        low = ((word << 8) & 0x8000) | ((word << 4) & 0x07F0)
        high = (word & 0x8000) | ((word >> 4) & 0x07F0)
        by = (each << 16).to(tl.float32, bitcast=True)
        a = (low << 16).to(tl.float32, bitcast=True) * by
        b = (high << 16).to(tl.float32, bitcast=True) * by
    else:
        a = tl.inline_asm_elementwise(
            LOW_TO_BF16, "=r,r,r,r", [words, each], dtype=tl.bfloat16, is_pure=True, pack=2
        )
        b = tl.inline_asm_elementwise(
            HIGH_TO_BF16, "=r,r,r,r", [words, each], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return a, b


@jit
def _across(x, k, live, WIDE: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """`[WIDE, M]` of the inputs whose rows start at `x`, from column k on."""
    column = k + tl.arange(0, WIDE)
    kept = live[None, :]
    if COLUMNS % 128 != 0:
        kept = kept & (column < COLUMNS)[:, None]
    value = tl.load(x[None, :] + column[:, None], mask=kept, other=0.0)
    if EXACT:
        value = value.to(tl.float32)
    return value


@jit
def _step(
    acc, b, x, xs, w, ws, n, live, N: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Add block b; `x` and `xs` point at rows, `w` and `ws` at the matrix."""
    BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    TALL: tl.constexpr = (N + 127) // 128
    near = tl.minimum(n, N - 1)
    if KIND == "fp8":
        j = tl.arange(0, 64)
        words = tl.load(w + (near.to(tl.int64) + b * N)[:, None] * 64 + j[None, :])
        low, high = widen_words(words, tl.load(ws + b * TALL + near // 128) * 2.0**120, EXACT)
        first = _across(x, b * 128, live, 64, COLUMNS, EXACT)
        second = _across(x, b * 128 + 64, live, 64, COLUMNS, EXACT)
        acc = tl.dot(low, first, acc, input_precision="ieee")
        acc = tl.dot(high, second, acc, input_precision="ieee")
    elif KIND == "quant":
        j = tl.arange(0, 128)
        codes = tl.load(w + (near.to(tl.int64) + b * N)[:, None] * 128 + j[None, :])
        inputs = _across(x, b * 128, live, 128, BLOCKS * 128, EXACT)
        if EXACT:
            codes = codes.to(tl.float32)
        of_rows = tl.load(xs + b, mask=live, other=0.0)
        of_tile = tl.load(ws + b * TALL + near // 128)
        made = tl.dot(codes, inputs, input_precision="ieee")
        acc += made * (of_tile[:, None] * of_rows[None, :])
    else:
        column = b * 128 + tl.arange(0, 128)
        at = w + near.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        if COLUMNS % 128 != 0:
            weights = tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)
        else:
            weights = tl.load(at)
        if EXACT:
            weights = weights.to(tl.float32)
        inputs = _across(x, b * 128, live, 128, COLUMNS, EXACT)
        acc = tl.dot(weights, inputs, acc, input_precision="ieee")
    return acc


@jit
def dense_kernel(
    x, xs, w, ws, out, made, counters, M, N: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr, JOIN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """One tile of `[M, GROUPS * N]` outputs, or of one chunk's part of them; see `dense.py`."""
    BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
    TALL: tl.constexpr = (N + 127) // 128
    WIDE: tl.constexpr = BLOCKS * 128 if KIND == "quant" else COLUMNS  # a row of inputs
    deep = tl.cdiv(M, BM)
    n = (tl.program_id(0) // deep) * BN + tl.arange(0, BN)
    m = (tl.program_id(0) % deep) * BM + tl.arange(0, BM)
    chunk, group = tl.program_id(1), tl.program_id(2)
    live = m < M
    row = m.to(tl.int64) * GROUPS + group
    x += row * WIDE
    if KIND == "quant":
        xs += row * BLOCKS
        w += group.to(tl.int64) * BLOCKS * N * 128
        ws += group * BLOCKS * TALL
    if KIND == "fp8":
        w += group.to(tl.int64) * BLOCKS * N * 64
        ws += group * BLOCKS * TALL
    if KIND == "bf16":
        w += group.to(tl.int64) * N * COLUMNS
    begin(EARLY)
    total = tl.zeros((BN, BM), tl.float32)
    if APART or CHUNK >= BLOCKS:
        for b in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, BLOCKS)):
            total = _step(total, b, x, xs, w, ws, n, live, N, COLUMNS, KIND, EXACT)
    else:
        for first in range(0, BLOCKS, CHUNK):
            acc = tl.zeros((BN, BM), tl.float32)
            for b in range(first, tl.minimum(first + CHUNK, BLOCKS)):
                acc = _step(acc, b, x, xs, w, ws, n, live, N, COLUMNS, KIND, EXACT)
            total += acc
    inside = live[None, :] & (n < N)[:, None]
    place = m.to(tl.int64)[None, :] * (GROUPS * N) + (group * N + n)[:, None]
    size = tl.full([], GROUPS * N, tl.int64) * M
    tl.store(out + chunk * size + place, rounded(total, out.dtype.element_ty, EXACT), mask=inside)
    if JOIN:
        CHUNKS: tl.constexpr = (BLOCKS + CHUNK - 1) // CHUNK
        tl.debug_barrier()
        counter = counters + group * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == CHUNKS - 1:
            total = tl.load(out + place, mask=inside, other=0.0, cache_modifier=".cg")
            for c in tl.static_range(1, CHUNKS):  # all are on their way before the first is added
                total += tl.load(
                    out + c * size + place, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(made + place, rounded(total, made.dtype.element_ty, EXACT), mask=inside)
            tl.store(counter, 0)


@jit
def sum_kernel(
    parts, out, size, CHUNKS: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """`out[i] = parts[0, i] + parts[1, i] + ...`, one after the other."""
    begin(EARLY)
    i = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    total = tl.load(parts + i, mask=i < size, other=0.0)
    for c in tl.static_range(1, CHUNKS):
        total += tl.load(parts + c * size + i, mask=i < size, other=0.0)
    tl.store(out + i, rounded(total, out.dtype.element_ty, EXACT), mask=i < size)
