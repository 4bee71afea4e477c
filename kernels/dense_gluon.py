"""The kernel of `dense_triton` in Gluon for Hopper: copies by the bulk engine, weights asked for early.

A program asks for its first blocks of weights before it waits for the kernel before it, which cannot have
written them: what is read most is on its way while that kernel still runs. An FP8 block is widened while
the one before it is multiplied. Cuts and the order of sums are those of `dense_triton`.

A tile is BN outputs by BM rows; a stage holds SPAN columns of weights and of inputs, in buffers of 128
bytes a row: one block of 128 columns, or half of one where a tile is so large that no whole ones would be on
their way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from whalepod.kernels.dense_triton import HIGH_TO_BF16, LOW_TO_BF16
from whalepod.kernels.overlap_gluon import barrier, begin


@gluon.jit
def ask(rows, row, column, bar, buffers, stage, SPAN: gl.constexpr):
    """A stage's columns from `column` on: as many buffers as they take."""
    WIDE: gl.constexpr = rows.block_shape[1]
    for part in gl.static_range(SPAN // WIDE):
        to = buffers.index(stage * (SPAN // WIDE) + part)
        tma.async_copy_global_to_shared(rows, [row, column + part * WIDE], bar, to)


@gluon.jit
def ask_weights(w, n, b, group, bar, buffers, stage, N: gl.constexpr, BLOCKS: gl.constexpr,
                KIND: gl.constexpr, BYTES: gl.constexpr, SPAN: gl.constexpr):  # fmt: skip
    """The b-th columns of the outputs from n on. The stage is there when its inputs are, too."""
    mbarrier.expect(bar, BYTES)
    if KIND == "bf16":
        ask(w, group * N + n, b * SPAN, bar, buffers, stage, SPAN)
    else:
        row = (group * BLOCKS + b) * N + n
        tma.async_copy_global_to_shared(w, [row, 0], bar, buffers.index(stage))


@gluon.jit
def half(words, factor, ASM: gl.constexpr):
    """Half of a block's columns in bf16, times the factor: of words' low bytes, or of their high ones."""
    twice = (factor * 2.0**120).to(gl.int32, bitcast=True) >> 16
    each = gl.full(words.shape, 0, gl.int32, words.type.layout) + twice
    return gl.inline_asm_elementwise(ASM, "=r,r,r,r", [words, each], gl.bfloat16, True, 2)


@gluon.jit
def times(a, x, at, acc, go_on):
    """Start adding `a` times the inputs of a buffer; from zero unless `go_on`."""
    return warpgroup_mma(a, x.index(at).permute((1, 0)), acc, use_acc=go_on, is_async=True)


@gluon.jit
def refill(x, w, i, first, count, column, m, n, group, bars, weights, inputs, N: gl.constexpr,
           BLOCKS: gl.constexpr, KIND: gl.constexpr, BYTES: gl.constexpr,
           STAGES: gl.constexpr, SPAN: gl.constexpr):  # fmt: skip
    """All have multiplied the columns before the i-th: their stage is free for later ones."""
    barrier()
    if (i > 0) & (i + STAGES - 1 < count):
        free, later = (i - 1) % STAGES, i + STAGES - 1
        bar = bars.index(free)
        ask_weights(w, n, first + later, group, bar, weights, free, N, BLOCKS, KIND, BYTES, SPAN)
        ask(x, m, column + later * SPAN, bar, inputs, free, SPAN)


@gluon.jit
def scale_of(table, b):
    """Scale of a block of columns."""
    return gl.sum(table.index(b).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def sum_words(x, w, table, start, size, first, count, column, m, n, group, bars, weights, inputs,
              N: gl.constexpr, BLOCKS: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr,
              ACC: gl.constexpr):  # fmt: skip
    """A tile's sum over blocks of FP8 words: while half a block is multiplied, the next half is widened.

    One loop: products under way across the border of two would be waited for.
    """
    stop = start + size
    WORDS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    BN: gl.constexpr = weights.shape[1]
    BM: gl.constexpr = inputs.shape[1]
    acc = gl.zeros([BN, BM], gl.float32, ACC)
    factor = scale_of(table, start)
    mbarrier.wait(bars.index(start % STAGES), start // STAGES % 2)
    words = weights.index(start % STAGES).load(WORDS)
    low, high = half(words, factor, LOW_TO_BF16), half(words, factor, HIGH_TO_BF16)
    # A wait for all products but one keeps what is multiplied in its registers.
    acc, _ = warpgroup_mma_wait(1, deps=[times(low, inputs, 2 * (start % STAGES), acc, False), low])
    for j in range(size):  # a constant, where it can be: a loop that may be empty has such a border
        i = start + j
        acc = times(high, inputs, 2 * (i % STAGES) + 1, acc, True)
        refill(x, w, i, first, count, column, m, n, group, bars, weights, inputs, N, BLOCKS, "fp8",
               BYTES, STAGES, 128)  # fmt: skip
        following = gl.minimum(i + 1, stop - 1)
        factor = scale_of(table, following)
        mbarrier.wait(bars.index(following % STAGES), following // STAGES % 2)
        words = weights.index(following % STAGES).load(WORDS)
        acc, _ = warpgroup_mma_wait(1, deps=[acc, low])
        low = half(words, factor, LOW_TO_BF16)
        if j + 1 < size:
            acc = times(low, inputs, 2 * (following % STAGES), acc, True)
            acc, _ = warpgroup_mma_wait(1, deps=[acc, high])
            high = half(words, factor, HIGH_TO_BF16)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, high])
    return acc


@gluon.jit
def sum_rows(x, w, first, count, column, m, n, group, bars, weights, inputs, N: gl.constexpr,
             CHUNK: gl.constexpr, WHOLE: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr,
             SPAN: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """A tile's sum over bf16 columns, counted in stages: one is multiplied while others are on their way."""
    PARTS: gl.constexpr = SPAN // 64
    BN: gl.constexpr = weights.shape[1]
    BM: gl.constexpr = inputs.shape[1]
    none = gl.zeros([BN, BM], gl.float32, ACC)
    total, i = none, 0
    for start in range(0, count, CHUNK):
        acc = none
        for b in range(start, gl.minimum(start + CHUNK, count)):
            stage = i % STAGES
            mbarrier.wait(bars.index(stage), i // STAGES % 2)
            for part in gl.static_range(PARTS):
                at = PARTS * stage + part
                acc = times(weights.index(at), inputs, at, acc, (b > start) | (part > 0))
            acc = warpgroup_mma_wait(PARTS, deps=[acc])  # for the stage before this one
            refill(x, w, i, first, count, column, m, n, group, bars, weights, inputs, N, 0, "bf16",
                   BYTES, STAGES, SPAN)  # fmt: skip
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        total = acc if WHOLE else total + acc
    return total


@gluon.jit
def sum_quant(x, w, xs, scales, first, count, column, m, n, group, live, bars, weights, inputs,
              N: gl.constexpr, BLOCKS: gl.constexpr, CHUNK: gl.constexpr, BYTES: gl.constexpr,
              STAGES: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """A tile's sum over FP8 blocks that are multiplied as they are, each scaled after."""
    TALL: gl.constexpr = (N + 127) // 128
    BN: gl.constexpr = weights.shape[1]
    BM: gl.constexpr = inputs.shape[1]
    none = gl.zeros([BN, BM], gl.float32, ACC)
    total, i = none, 0
    of_tile, of_rows = gl.load(scales), gl.load(xs, mask=live, other=0.0)
    for start in range(0, count, CHUNK):
        acc = none
        for _ in range(start, gl.minimum(start + CHUNK, count)):
            stage = i % STAGES
            mbarrier.wait(bars.index(stage), i // STAGES % 2)
            z = times(weights.index(stage), inputs, stage, none, False)
            refill(x, w, i, first, count, column, m, n, group, bars, weights, inputs, N, BLOCKS,
                   "quant", BYTES, STAGES, 128)  # fmt: skip
            both = none + gl.expand_dims(of_rows * of_tile, 0)
            following = gl.minimum(i + 1, count - 1)
            of_tile = gl.load(scales + following * TALL)
            of_rows = gl.load(xs + following, mask=live, other=0.0)
            acc = gl.fma(warpgroup_mma_wait(0, deps=[z]), both, acc)
            i += 1
        total = acc if CHUNK >= BLOCKS else total + acc
    return total


@gluon.jit
def dense_kernel(
    x, xs, w, ws, out, made, counters, M, N: gl.constexpr, COLUMNS: gl.constexpr,
    KIND: gl.constexpr, GROUPS: gl.constexpr, CHUNK: gl.constexpr, APART: gl.constexpr,
    JOIN: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    SPAN: gl.constexpr, ROOM: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """As `dense_triton.dense_kernel`; `x` and `w` are descriptors of their rows."""
    BLOCKS: gl.constexpr = (COLUMNS + 127) // 128
    TALL: gl.constexpr = (N + 127) // 128
    WIDE: gl.constexpr = BLOCKS * 128 if KIND == "quant" else COLUMNS  # a row of inputs
    PARTS: gl.constexpr = 1 if KIND == "quant" else SPAN // 64  # buffers of a stage's inputs
    OWN: gl.constexpr = SPAN // 64 if KIND == "bf16" else 1  # and of its weights
    PER: gl.constexpr = 128 // SPAN  # stages of a block
    BYTES: gl.constexpr = 128 * (BN * OWN + BM * PARTS)
    DEPTH: gl.constexpr = 32 if KIND == "quant" else 16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, DEPTH])
    deep = gl.cdiv(M, BM)
    n, m = gl.program_id(0) // deep * BN, gl.program_id(0) % deep * BM
    chunk, group = gl.program_id(1), gl.program_id(2)
    first = chunk * (CHUNK * PER) if APART else 0
    count = gl.minimum(CHUNK * PER, BLOCKS * PER - first) if APART else BLOCKS * PER
    weights = gl.allocate_shared_memory(w.dtype, [STAGES * OWN, BN, w.block_shape[1]], w.layout)
    inputs = gl.allocate_shared_memory(x.dtype, [STAGES * PARTS, BM, x.block_shape[1]], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    barrier()
    for s in gl.static_range(STAGES):
        if s < count:
            bar = bars.index(s)
            ask_weights(w, n, first + s, group, bar, weights, s, N, BLOCKS, KIND, BYTES, SPAN)
    scales = ws
    if KIND != "bf16":
        scales = ws + (group * BLOCKS + first) * TALL + n // 128
    if KIND == "fp8":
        # All at once: a load on its way would hold up every copy into a stage that was read from.
        b = gl.arange(0, ROOM, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        found = gl.load(scales + b * TALL, mask=b < count, other=0.0)
    begin(EARLY)
    column = group * WIDE + first * SPAN
    for s in gl.static_range(STAGES):
        if s < count:
            ask(x, m, column + s * SPAN, bars.index(s), inputs, s, SPAN)
    if KIND == "fp8":
        ONE: gl.constexpr = APART or CHUNK >= BLOCKS
        SIZE: gl.constexpr = BLOCKS if BLOCKS < CHUNK else CHUNK
        size = SIZE if BLOCKS % SIZE == 0 else count
        total = gl.zeros([BN, BM], gl.float32, ACC)
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        whole = gl.allocate_shared_memory(gl.float32, [ROOM], flat, found)
        table = whole._reinterpret(gl.float32, [ROOM, 1], flat)
        barrier()
        if ONE:
            total = sum_words(
                x, w, table, 0, size, first, count, column, m, n, group, bars, weights, inputs, N,
                BLOCKS, BYTES, STAGES, ACC,
            )  # fmt: skip
        else:
            for start in range(0, BLOCKS // CHUNK * CHUNK, CHUNK):
                total += sum_words(
                    x, w, table, start, CHUNK, first, count, column, m, n, group, bars, weights,
                    inputs, N, BLOCKS, BYTES, STAGES, ACC,
                )  # fmt: skip
            if BLOCKS % CHUNK != 0:
                total += sum_words(
                    x, w, table, BLOCKS // CHUNK * CHUNK, BLOCKS % CHUNK, first, count, column, m,
                    n, group, bars, weights, inputs, N, BLOCKS, BYTES, STAGES, ACC,
                )  # fmt: skip
    elif KIND == "bf16":
        total = sum_rows(
            x, w, first, count, column, m, n, group, bars, weights, inputs, N, CHUNK * PER,
            CHUNK >= BLOCKS, BYTES, STAGES, SPAN, ACC,
        )  # fmt: skip
    else:
        row = m + gl.arange(0, BM, gl.SliceLayout(0, ACC))
        xs += row.to(gl.int64) * (GROUPS * BLOCKS) + group * BLOCKS + first
        total = sum_quant(
            x, w, xs, scales, first, count, column, m, n, group, row < M, bars, weights, inputs, N,
            BLOCKS, CHUNK, BYTES, STAGES, ACC,
        )  # fmt: skip
    finish(total, out, made, counters, chunk, group, n, m, M, N, BLOCKS, GROUPS, CHUNK, JOIN)


@gluon.jit
def finish(total, out, made, counters, chunk, group, n, m, M, N: gl.constexpr,
           BLOCKS: gl.constexpr, GROUPS: gl.constexpr, CHUNK: gl.constexpr,
           JOIN: gl.constexpr):  # fmt: skip
    """Store a tile, or a chunk's part of it; the last of a tile's programs adds the parts."""
    BN: gl.constexpr = total.shape[0]
    BM: gl.constexpr = total.shape[1]
    EACH: gl.constexpr = 8 if BM >= 64 else 4  # outputs, which lie side by side, of a thread
    ACROSS: gl.constexpr = BN // EACH
    L: gl.constexpr = gl.BlockedLayout(
        [EACH, 1], [ACROSS, 32 // ACROSS], [1, gl.num_warps()], [0, 1]
    )
    total = gl.convert_layout(total, L)
    outputs = gl.expand_dims(n + gl.arange(0, BN, gl.SliceLayout(1, L)), 1)
    rows = gl.expand_dims(m + gl.arange(0, BM, gl.SliceLayout(0, L)), 0)
    inside = (rows < M) & (outputs < N)
    place = rows.to(gl.int64) * (GROUPS * N) + group * N + outputs
    part = (chunk * M).to(gl.int64) * (GROUPS * N)
    gl.store(out + part + place, total.to(out.dtype.element_ty), mask=inside)
    if JOIN:
        CHUNKS: gl.constexpr = (BLOCKS + CHUNK - 1) // CHUNK
        barrier()
        counter = counters + group * gl.num_programs(0) + gl.program_id(0)
        if gl.atomic_add(counter, 1, sem="acq_rel") == CHUNKS - 1:
            total = gl.load(out + place, mask=inside, other=0.0, cache_modifier=".cg")
            for c in gl.static_range(1, CHUNKS):  # all are on their way before the first is added
                total += gl.load(
                    out + c * M * (GROUPS * N) + place, mask=inside, other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
            gl.store(made + place, total.to(made.dtype.element_ty), mask=inside)
            gl.store(counter, 0)
