"""Index scores in Gluon for Hopper: the formats of `index_scores_triton`, copies ahead of products.

Legend: as there; a tile has 128 keys, one warp group multiplies it.
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


@gluon.jit
def blocks_of(entry, seen, table, room, PER: gl.constexpr):
    """Block of each entry; 0 beyond those seen. The load does not wait for `seen`."""
    block = gl.load(table + entry // PER, mask=entry < room, other=0)
    return gl.where(entry < seen, block, 0).to(gl.int64)


@gluon.jit
def read_fp4(entry, block, seen, keys, STRIDE: gl.constexpr, PER: gl.constexpr, L: gl.constexpr):
    """Data `[BN, 4, 16]` and scales `[BN, 4]` of a tile of entries."""
    G: gl.constexpr = gl.SliceLayout(2, L)
    page = keys + block * STRIDE
    group = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, G)), 0)
    inside = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    inside = gl.expand_dims(gl.expand_dims(inside, 0), 1)
    real = gl.expand_dims(entry < seen, 1)
    at = gl.expand_dims(page + entry % PER * 64, 1) + 16 * group
    data = gl.load(gl.expand_dims(at, 2) + inside, mask=gl.expand_dims(real, 2), other=0)
    at = gl.expand_dims(page + PER * 64 + entry % PER * 4, 1) + group
    return data, gl.load(at, mask=real, other=0)


@gluon.jit
def read_rows(entry, block, seen, keys, stride, offset, L: gl.constexpr):
    """128 values of each entry; `stride` of a block's first, `offset` within the block."""
    at = gl.expand_dims(keys + block * stride + offset, 1)
    at = at + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, L)), 0)
    return at, gl.expand_dims(entry < seen, 1)


@gluon.jit
def read_fp8(entry, block, seen, keys, STRIDE: gl.constexpr, PER: gl.constexpr, L: gl.constexpr):
    """Data `[BN, 128]` and scales `[BN]` of a tile of entries."""
    at, real = read_rows(entry, block, seen, keys, STRIDE, entry % PER * 128, L)
    page = (keys + block * STRIDE + PER * 128).to(gl.pointer_type(gl.float32))
    scales = gl.load(page + entry % PER, mask=entry < seen, other=0.0)
    return gl.load(at, mask=real, other=0), scales


@gluon.jit
def finish(z, g, at, count, out, E, scale, BN: gl.constexpr):
    """Gate, sum over heads, and store a tile's scores."""
    L: gl.constexpr = z.type.layout
    score = gl.sum(gl.maximum(z, 0.0) * gl.expand_dims(g, 0), 1) * scale
    entry = at + gl.arange(0, BN, gl.SliceLayout(1, L))
    gl.store(out + entry, gl.where(entry < count, score, float("-inf")), mask=entry < E)


@gluon.jit
def scores_kernel(
    q, gate, keys, table, sequences, seen, out, width, E, HEADS, RUN, STRIDE: gl.constexpr,
    H: gl.constexpr, DIM: gl.constexpr, PER: gl.constexpr, KIND: gl.constexpr, BN: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    """Grid (runs of tiles, T); `OWN`: query t has row t of the table."""
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    t = gl.program_id(1).to(gl.int64)
    first = gl.program_id(0) * RUN * BN
    count = gl.load(seen + t).to(gl.int32)
    sequence = t if OWN else gl.load(sequences + t).to(gl.int64)
    stop = gl.minimum(first + RUN * BN, count)
    out += t * E
    lane = gl.arange(0, BN, FLAT)
    beyond = gl.maximum(first, gl.cdiv(count, BN) * BN)
    for at in range(beyond, gl.minimum(first + RUN * BN, E), BN):
        gl.store(out + at + lane, gl.full([BN], float("-inf"), gl.float32, FLAT), mask=at + lane < E)
    if first < count:
        table += sequence * width
        own = gl.arange(0, H, gl.SliceLayout(0, Z))
        g = gl.load(gate + t * HEADS + own, mask=own < HEADS, other=0.0).to(gl.float32)
        none = gl.zeros([BN, H], gl.float32, Z)
        WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        head = gl.expand_dims(gl.arange(0, H, gl.SliceLayout(1, WIDE)), 1)
        mine = q + t * HEADS * DIM + head * DIM
        if KIND == "fp4":
            L: gl.constexpr = gl.BlockedLayout([1, 1, 16], [8, 4, 1], [4, 1, 1], [2, 1, 0])
            ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
            HALF: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            dims = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, WIDE)), 0)
            both = gl.load(mine + dims, mask=head < HEADS, other=0.0)
            low, high = gl.split(gl.reshape(both, [H, DIM // 2, 2]))
            low = gl.allocate_shared_memory(
                gl.bfloat16, [H, DIM // 2], SHARED, gl.convert_layout(low, HALF)
            )
            high = gl.allocate_shared_memory(
                gl.bfloat16, [H, DIM // 2], SHARED, gl.convert_layout(high, HALF)
            )
            evens = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM // 2], SHARED)
            odds = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM // 2], SHARED)
            row = gl.arange(0, BN, ROWS)
            block = blocks_of(first + row, count, table, E, PER)
            codes, scales = read_fp4(first + row, block, count, keys, STRIDE, PER, L)
            block = blocks_of(first + BN + row, count, table, E, PER)
            for at in range(first, stop, BN):
                exponent = scales.to(gl.int32) + 100
                twice = gl.expand_dims(exponent << 7 | exponent << 23, 2)
                twice = twice + gl.zeros([BN, 4, 16], gl.int32, L)
                even, odd = gl.inline_asm_elementwise(
                    FP4_TO_BF16, "=r,=r,=r,=r,r,r,r,r,r", [codes, twice],
                    (gl.bfloat16, gl.bfloat16), True, 4,
                )  # fmt: skip
                codes, scales = read_fp4(at + BN + row, block, count, keys, STRIDE, PER, L)
                block = blocks_of(at + 2 * BN + row, count, table, E, PER)
                gl.thread_barrier()
                evens.store(gl.reshape(even, [BN, DIM // 2]))
                odds.store(gl.reshape(odd, [BN, DIM // 2]))
                fence_async_shared()
                gl.thread_barrier()
                z = warpgroup_mma(evens, low.permute((1, 0)), none, use_acc=False, is_async=True)
                z = warpgroup_mma(odds, high.permute((1, 0)), z, is_async=True)
                z = warpgroup_mma_wait(0, deps=[z])
                finish(z, g, at, count, out, E, 67108864.0, BN)
        else:
            dims = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, WIDE)), 0)
            query = gl.allocate_shared_memory(
                gl.bfloat16, [H, DIM], SHARED, gl.load(mine + dims, mask=head < HEADS, other=0.0)
            )
            if KIND == "fp8":
                L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
                row = gl.arange(0, BN, gl.SliceLayout(1, L))
                buffer = gl.allocate_shared_memory(gl.bfloat16, [BN, DIM], SHARED)
                block = blocks_of(first + row, count, table, E, PER)
                codes, scales = read_fp8(first + row, block, count, keys, STRIDE, PER, L)
                block = blocks_of(first + BN + row, count, table, E, PER)
                for at in range(first, stop, BN):
                    wide = gl.inline_asm_elementwise(
                        FP8_TO_BF16, "=r,=r,r", [codes], gl.bfloat16, True, 4
                    )
                    scale = gl.convert_layout(scales, gl.SliceLayout(1, Z))
                    ahead = at + BN + row
                    codes, scales = read_fp8(ahead, block, count, keys, STRIDE, PER, L)
                    block = blocks_of(ahead + BN, count, table, E, PER)
                    gl.thread_barrier()
                    buffer.store(wide)
                    fence_async_shared()
                    gl.thread_barrier()
                    z = warpgroup_mma(
                        buffer, query.permute((1, 0)), none, use_acc=False, is_async=True
                    )
                    z = warpgroup_mma_wait(0, deps=[z])
                    finish(z, g, at, count, out, E, scale, BN)
            else:
                row = gl.arange(0, BN, gl.SliceLayout(1, WIDE))
                buffers = gl.allocate_shared_memory(gl.bfloat16, [3, BN, DIM], SHARED)
                block = blocks_of(first + row, count, table, E, PER)
                for ready in gl.static_range(2):
                    entry = first + ready * BN + row
                    at_, real = read_rows(
                        entry, block, count, keys, PER * DIM, entry % PER * DIM, WIDE
                    )
                    async_copy.async_copy_global_to_shared(buffers.index(ready), at_, mask=real)
                    async_copy.commit_group()
                    block = blocks_of(entry + BN, count, table, E, PER)
                for at in range(first, stop, BN):
                    i = (at - first) // BN
                    async_copy.wait_group(1)
                    fence_async_shared()
                    gl.thread_barrier()
                    z = warpgroup_mma(
                        buffers.index(i % 3), query.permute((1, 0)), none, use_acc=False,
                        is_async=True,
                    )  # fmt: skip
                    entry = at + 2 * BN + row
                    at_, real = read_rows(
                        entry, block, count, keys, PER * DIM, entry % PER * DIM, WIDE
                    )
                    real = real & gl.expand_dims(entry < stop, 1)
                    async_copy.async_copy_global_to_shared(
                        buffers.index((i + 2) % 3), at_, mask=real
                    )
                    async_copy.commit_group()
                    block = blocks_of(entry + BN, count, table, E, PER)
                    z = warpgroup_mma_wait(0, deps=[z])
                    finish(z, g, at, count, out, E, 1.0, BN)
