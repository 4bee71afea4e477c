"""The kernel of `dense_triton` in Gluon for Hopper: copies by the bulk engine, weights asked for early.

A program asks for its first blocks of weights before it waits for the kernel before it, which cannot have
written them: what is read most is on its way while that kernel still runs. An FP8 block is widened while
the one before it is multiplied. Cuts and the order of sums are those of `dense_triton`.

A tile is BN outputs by BM rows; a stage holds one block of 128 columns of weights and of inputs, in
buffers of 128 bytes a row.
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

from whalepod.kernels.dense_triton import E4M3_TO_BF16
from whalepod.kernels.overlap_gluon import begin

# Triton 3.7 has renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def ask(rows, row, column, bar, buffers, stage):
    """A stage's 128 columns from `column` on: as many buffers as they take."""
    WIDE: gl.constexpr = rows.block_shape[1]
    for part in gl.static_range(128 // WIDE):
        to = buffers.index(stage * (128 // WIDE) + part)
        tma.async_copy_global_to_shared(rows, [row, column + part * WIDE], bar, to)


@gluon.jit
def ask_weights(w, n, b, group, bar, buffers, stage, N: gl.constexpr, BLOCKS: gl.constexpr,
                KIND: gl.constexpr, BYTES: gl.constexpr):  # fmt: skip
    """Block b of the outputs from n on. The stage is there when its inputs are, too."""
    mbarrier.expect(bar, BYTES)
    if KIND == "bf16":
        ask(w, group * N + n, b * 128, bar, buffers, stage)
    else:
        row = (group * BLOCKS + b) * N + n
        tma.async_copy_global_to_shared(w, [row, 0], bar, buffers.index(stage))


@gluon.jit
def widened(words, factor, BN: gl.constexpr, L: gl.constexpr):
    """Both halves of a block's weights `[BN, 64]` in bf16, times the factor, as first operands."""
    words = words.load(L)
    twice = (factor * 2.0**120).to(gl.int32, bitcast=True) >> 16
    return gl.inline_asm_elementwise(
        E4M3_TO_BF16, "=&r,=&r,r,r,r", [words, gl.full([BN, 64], 0, gl.int32, L) + twice],
        (gl.bfloat16, gl.bfloat16), True, 2,
    )  # fmt: skip


@gluon.jit
def product_of(a, b, x, stage, acc, go_on):
    """Start `acc + a x0 + b x1` over both halves of a block, from zero unless `go_on`."""
    x0, x1 = x.index(2 * stage).permute((1, 0)), x.index(2 * stage + 1).permute((1, 0))
    acc = warpgroup_mma(a, x0, acc, use_acc=go_on, is_async=True)
    return warpgroup_mma(b, x1, acc, is_async=True)


@gluon.jit
def dense_kernel(
    x, xs, w, ws, out, made, counters, M, N: gl.constexpr, COLUMNS: gl.constexpr,
    KIND: gl.constexpr, GROUPS: gl.constexpr, CHUNK: gl.constexpr, APART: gl.constexpr,
    JOIN: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr = False,
):  # fmt: skip
    """As `dense_triton.dense_kernel`; `x` and `w` are descriptors of their rows."""
    BLOCKS: gl.constexpr = (COLUMNS + 127) // 128
    TALL: gl.constexpr = (N + 127) // 128
    WIDE: gl.constexpr = BLOCKS * 128 if KIND == "quant" else COLUMNS  # a row of inputs
    PARTS: gl.constexpr = 1 if KIND == "quant" else 2  # buffers of a stage's inputs
    OWN: gl.constexpr = 2 if KIND == "bf16" else 1  # and of its weights
    BYTES: gl.constexpr = 128 * (BN * OWN + BM * PARTS)
    DEPTH: gl.constexpr = 32 if KIND == "quant" else 16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, DEPTH])
    WORDS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    deep = gl.cdiv(M, BM)
    n, m = gl.program_id(0) // deep * BN, gl.program_id(0) % deep * BM
    chunk, group = gl.program_id(1), gl.program_id(2)
    first = chunk * CHUNK if APART else 0
    count = gl.minimum(CHUNK, BLOCKS - first) if APART else BLOCKS
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
            ask_weights(w, n, first + s, group, bar, weights, s, N, BLOCKS, KIND, BYTES)
    scales, factor, ahead = ws, 1.0, 1.0
    if KIND != "bf16":
        scales = ws + (group * BLOCKS + first) * TALL + n // 128
        factor, ahead = gl.load(scales), gl.load(scales + gl.minimum(1, count - 1) * TALL)
    begin(EARLY)
    column = group * WIDE + first * 128
    for s in gl.static_range(STAGES):
        if s < count:
            ask(x, m, column + s * 128, bars.index(s), inputs, s)
    none = gl.zeros([BN, BM], gl.float32, ACC)
    total, acc = none, none
    row = m + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    if KIND == "quant":
        xs += row.to(gl.int64) * (GROUPS * BLOCKS) + group * BLOCKS + first
        of_rows = gl.load(xs, mask=row < M, other=0.0)
    mbarrier.wait(bars.index(0), 0)
    if KIND == "fp8":
        low, high = widened(weights.index(0), factor, BN, WORDS)
    i = 0
    for start in range(0, count, CHUNK):
        if KIND == "quant":
            acc = none
        for b in range(start, gl.minimum(start + CHUNK, count)):
            stage, following = i % STAGES, gl.minimum(i + 1, count - 1)
            scale, factor = factor, ahead
            if KIND != "bf16":
                ahead = gl.load(scales + gl.minimum(i + 2, count - 1) * TALL)
            there, turn = bars.index(following % STAGES), following // STAGES % 2
            if KIND == "fp8":
                acc = product_of(low, high, inputs, stage, acc, b > start)
                mbarrier.wait(there, turn)
                low1, high1 = widened(weights.index(following % STAGES), factor, BN, WORDS)
                # The operands in registers must stay until they are multiplied.
                acc, _, _ = warpgroup_mma_wait(0, deps=[acc, low, high])
                low, high = low1, high1
            elif KIND == "quant":
                z = warpgroup_mma(
                    weights.index(stage), inputs.index(stage).permute((1, 0)), none,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                both = none + gl.expand_dims(of_rows * scale, 0)
                of_rows = gl.load(xs + following, mask=row < M, other=0.0)
                z = warpgroup_mma_wait(0, deps=[z])
                acc = gl.fma(z, both, acc)
                mbarrier.wait(there, turn)
            else:
                a, c = weights.index(2 * stage), weights.index(2 * stage + 1)
                acc = product_of(a, c, inputs, stage, acc, b > start)
                mbarrier.wait(there, turn)
                acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            if i + STAGES < count:
                bar, next_b = bars.index(stage), first + i + STAGES
                ask_weights(w, n, next_b, group, bar, weights, stage, N, BLOCKS, KIND, BYTES)
                ask(x, m, column + (i + STAGES) * 128, bar, inputs, stage)
            i += 1
        total = acc if APART or CHUNK >= BLOCKS else total + acc
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
