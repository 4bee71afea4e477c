"""Index scores in Gluon for Hopper: the formats of `index_scores_triton`, copies ahead of products.

Legend: as there; a tile has 64 or 128 keys, one warp group multiplies it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from whalepod.kernels.index_scores_triton import FP4_TO_BF16, FP8_TO_BF16
from whalepod.kernels.overlap_gluon import barrier, begin


@gluon.jit
def blocks_of(entry, table, room, PER: gl.constexpr):
    """Block of each entry; entries that are not seen may have any. Nothing waits for the load."""
    return gl.load(table + entry // PER, mask=entry < room, other=0)


@gluon.jit
def read_fp4(entry, block, stop, keys, STRIDE: gl.constexpr, PER: gl.constexpr, L: gl.constexpr):
    """Data `[BN, 4, 4]`, 8 codes a word, and scales `[BN, 4]` of a tile of entries."""
    G: gl.constexpr = gl.SliceLayout(2, L)
    page = keys + gl.where(entry < stop, block, 0).to(gl.int64) * STRIDE
    group = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, G)), 0)
    inside = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    inside = gl.expand_dims(gl.expand_dims(inside, 0), 1)
    at = (page + entry % PER * 64).to(gl.pointer_type(gl.int32))
    at = gl.expand_dims(gl.expand_dims(at, 1) + 4 * group, 2) + inside
    scales = gl.load(gl.expand_dims(page + PER * 64 + entry % PER * 4, 1) + group)
    return gl.load(at), scales


@gluon.jit
def widen_fp4(codes, scales, evens, odds, BN: gl.constexpr):
    """Write a tile's even and odd dims as bf16, times 2^-26."""
    exponent = scales.to(gl.int32) + 100
    twice = gl.expand_dims(exponent << 7 | exponent << 23, 2) + gl.zeros_like(codes)
    a, b, c, d = gl.inline_asm_elementwise(
        FP4_TO_BF16, "=r,=r,=r,=r,r,r", [codes, twice],
        (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
    )  # fmt: skip
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    evens._reinterpret(gl.int32, [BN, 32], words).store(gl.reshape(gl.join(a, b), [BN, 32]))
    odds._reinterpret(gl.int32, [BN, 32], words).store(gl.reshape(gl.join(c, d), [BN, 32]))


@gluon.jit
def read_fp8(entry, block, stop, keys, STRIDE: gl.constexpr, PER: gl.constexpr, L: gl.constexpr):
    """Data `[BN, 32]`, 4 codes a word, and scales `[BN]` of a tile of entries."""
    page = keys + gl.where(entry < stop, block, 0).to(gl.int64) * STRIDE
    at = (page + entry % PER * 128).to(gl.pointer_type(gl.int32))
    word = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, L)), 0)
    scales = gl.load((page + PER * 128).to(gl.pointer_type(gl.float32)) + entry % PER)
    return gl.load(gl.expand_dims(at, 1) + word), scales


@gluon.jit
def widen_fp8(codes, to, BN: gl.constexpr):
    """Write a tile's dims as bf16."""
    a, b = gl.inline_asm_elementwise(FP8_TO_BF16, "=r,=r,r", [codes], (gl.int32, gl.int32), True, 1)
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    both = gl.reshape(gl.join(a, b), [BN, 64])
    to._reinterpret(gl.int32, [BN, 64], words).store(both)


@gluon.jit
def copy_rows(to, entry, block, stop, keys, PER: gl.constexpr, L: gl.constexpr):
    """Start copying a tile's rows; one thread works a row's address out for all that copy it."""
    row = gl.where(entry < stop, block, 0).to(gl.int64) * PER + entry % PER
    at = gl.convert_layout(keys + row * 128, gl.SliceLayout(1, L))
    dims = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, L)), 0)
    async_copy.async_copy_global_to_shared(to, gl.expand_dims(at, 1) + dims)
    async_copy.commit_group()


@gluon.jit
def finish(z, g, at, count, out, E, scale, BN: gl.constexpr):
    """Gate, sum over heads, and store a tile's scores."""
    L: gl.constexpr = z.type.layout
    score = gl.sum(gl.maximum(z, 0.0) * gl.expand_dims(g, 0), 1) * scale
    entry = at + gl.arange(0, BN, gl.SliceLayout(1, L))
    gl.store(out + entry, gl.where(entry < count, score, float("-inf")), mask=entry < E)


@gluon.jit
def scores_kernel(
    q, gate, keys, table, sequences, seen, out, width, E, HEADS, RUN, step, factor, STRIDE: gl.constexpr,
    H: gl.constexpr, DIM: gl.constexpr, PER: gl.constexpr, KIND: gl.constexpr, BN: gl.constexpr,
    OWN: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """Grid (runs of tiles, T); `OWN`: query t has row t of the table."""
    begin(EARLY)
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    t = gl.program_id(1).to(gl.int64)
    first = gl.program_id(0) * RUN * BN
    count = gl.load(seen + t).to(gl.int32)
    sequence = t if OWN else gl.load(sequences + t).to(gl.int64)
    table += sequence * width
    if KIND == "fp4":
        L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [4, 1, 1], [2, 1, 0])
        row = gl.arange(0, BN, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    elif KIND == "fp8":
        L: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
        row = gl.arange(0, BN, gl.SliceLayout(1, L))
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        row = gl.arange(0, BN, FLAT)
    # Where the keys are comes first, whether they are seen or not: all else waits for less.
    block = blocks_of(first + row, table, E, PER)
    block1 = blocks_of(first + BN + row, table, E, PER)
    block2 = blocks_of(first + 2 * BN + row, table, E, PER)
    block3 = blocks_of(first + 3 * BN + row, table, E, PER)
    block4 = blocks_of(first + 4 * BN + row, table, E, PER)
    stop = gl.minimum(first + RUN * BN, count)
    out += t * E
    lane = gl.arange(0, BN, FLAT)
    beyond = gl.maximum(first, gl.cdiv(count, BN) * BN)
    for at in range(beyond, gl.minimum(first + RUN * BN, E), BN):
        gl.store(
            out + at + lane, gl.full([BN], float("-inf"), gl.float32, FLAT), mask=at + lane < E
        )
    if first < count:
        if KIND == "fp4":
            codes, scales = read_fp4(first + row, block, stop, keys, STRIDE, PER, L)
            codes1, scales1 = read_fp4(first + BN + row, block1, stop, keys, STRIDE, PER, L)
            codes2, scales2 = read_fp4(first + 2 * BN + row, block2, stop, keys, STRIDE, PER, L)
        elif KIND == "fp8":
            codes, scales = read_fp8(first + row, block, stop, keys, STRIDE, PER, L)
            codes1, scales1 = read_fp8(first + BN + row, block1, stop, keys, STRIDE, PER, L)
            codes2, scales2 = read_fp8(first + 2 * BN + row, block2, stop, keys, STRIDE, PER, L)
        else:
            buffers = gl.allocate_shared_memory(gl.bfloat16, [4, BN, DIM], SHARED)
            copy_rows(buffers.index(0), first + row, block, stop, keys, PER, L)
            copy_rows(buffers.index(1), first + BN + row, block1, stop, keys, PER, L)
            copy_rows(buffers.index(2), first + 2 * BN + row, block2, stop, keys, PER, L)
        own = gl.arange(0, H, gl.SliceLayout(0, Z))
        g = gl.load(gate + t * step + own, mask=own < HEADS, other=0.0).to(gl.float32) * factor
        none = gl.zeros([BN, H], gl.float32, Z)
        WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        head = gl.expand_dims(gl.arange(0, H, gl.SliceLayout(1, WIDE)), 1)
        dims = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, WIDE)), 0)
        query = gl.load(q + t * HEADS * DIM + head * DIM + dims, mask=head < HEADS, other=0.0)
        if KIND == "fp4":
            low, high = gl.split(gl.reshape(query, [H, DIM // 2, 2]))
            HALF: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            low = gl.allocate_shared_memory(
                gl.bfloat16, [H, DIM // 2], SHARED, gl.convert_layout(low, HALF)
            )
            high = gl.allocate_shared_memory(
                gl.bfloat16, [H, DIM // 2], SHARED, gl.convert_layout(high, HALF)
            )
            evens = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM // 2], SHARED)
            odds = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM // 2], SHARED)
        else:
            query = gl.allocate_shared_memory(gl.bfloat16, [H, DIM], SHARED, query)
            if KIND == "fp8":
                buffer = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM], SHARED)
        for at in range(first, stop, BN):
            ahead = at + 3 * BN + row
            scale = 1.0
            if KIND == "fp4":
                barrier()
                widen_fp4(codes, scales, evens, odds, BN)
                codes, scales, codes1, scales1 = codes1, scales1, codes2, scales2
                codes2, scales2 = read_fp4(ahead, block3, stop, keys, STRIDE, PER, L)
                fence_async_shared()
                barrier()
                z = warpgroup_mma(evens, low.permute((1, 0)), none, use_acc=False, is_async=True)
                z = warpgroup_mma(odds, high.permute((1, 0)), z, is_async=True)
                scale = 67108864.0
            elif KIND == "fp8":
                scale = gl.convert_layout(scales, gl.SliceLayout(1, Z))
                barrier()
                widen_fp8(codes, buffer, BN)
                codes, scales, codes1, scales1 = codes1, scales1, codes2, scales2
                codes2, scales2 = read_fp8(ahead, block3, stop, keys, STRIDE, PER, L)
                fence_async_shared()
                barrier()
                z = warpgroup_mma(buffer, query.permute((1, 0)), none, use_acc=False, is_async=True)
            else:
                turn = (at - first) // BN
                async_copy.wait_group(2)
                fence_async_shared()
                barrier()
                z = warpgroup_mma(
                    buffers.index(turn % 4), query.permute((1, 0)), none, use_acc=False,
                    is_async=True,
                )  # fmt: skip
                copy_rows(buffers.index((turn + 3) % 4), ahead, block3, stop, keys, PER, L)
            block3, block4 = block4, blocks_of(ahead + 2 * BN, table, E, PER)
            z = warpgroup_mma_wait(0, deps=[z])
            finish(z, g, at, count, out, E, scale, BN)
