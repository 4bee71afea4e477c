"""The kernels of `attention_triton` in Gluon for Hopper, where copies and products overlap.

Plain Triton waits for a tile's copy before it multiplies and starts the next one after. Here the
next tile arrives while this one is multiplied, and the scores of a tile are queued behind the
weighted sum of the one before. Cuts and the order of sums are those of `attention_triton`.

Legend: as there.
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

from whalepod.kernels.overlap_gluon import barrier, begin


@gluon.jit
def entry_rows(tile, where, rows, listed, table, width, RT: gl.constexpr, BN: gl.constexpr,
               PER: gl.constexpr, LISTED: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """What the lists say of each entry of a tile: its pool row, or its block.

    Nothing is computed from it here: that would wait for the load. Entries that are not seen may
    yield anything.
    """
    entry = (tile - RT) * BN + gl.arange(0, BN, L)
    if LISTED:
        at, real = rows + where.to(gl.int64) * listed + entry, entry < listed
    else:
        at, real = table + width * where.to(gl.int64) + entry // PER, entry < width * PER
    return gl.load(at, mask=(entry >= 0) & real, other=0)


@gluon.jit
def ring_age(tile, position, W: gl.constexpr, BN: gl.constexpr, L: gl.constexpr):
    """Of each slot of a ring tile: how many positions its key lies before the query."""
    return (position + W - (tile * BN + gl.arange(0, BN, L))) % W


@gluon.jit
def visible(tile, position, seen, W: gl.constexpr, BN: gl.constexpr, L: gl.constexpr):
    """Which keys of a tile the query sees."""
    RT: gl.constexpr = (W + BN - 1) // BN
    # A slot above the query's position is of the lap before the first.
    limit = gl.where(tile < RT, gl.minimum(W, position + 1), seen + RT * BN) - tile * BN
    return gl.arange(0, BN, L) < limit


@gluon.jit
def fetch(to, tile, row, own, position, slot, reach, seen, rings, pool, new, D: gl.constexpr,
          W: gl.constexpr, BN: gl.constexpr, PER: gl.constexpr, LISTED: gl.constexpr,
          NEW: gl.constexpr, FLAT: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Start copying a tile's keys, `[BN, D]`; in place of those not seen, the query's own."""
    RT: gl.constexpr = (W + BN - 1) // BN
    # One thread works a key's address out for all that copy it.
    lane = gl.arange(0, BN, FLAT)
    in_ring = slot.to(gl.int64) * W + tile * BN + lane
    row = row.to(gl.int64)
    if not LISTED:
        row = row * PER + ((tile - RT) * BN + lane) % PER
    at = gl.where(tile < RT, rings + in_ring * D, pool + row * D)
    mine = rings + (slot.to(gl.int64) * W + position % W) * D
    if NEW:
        mine = new + own.to(gl.int64) * D
        age = ring_age(tile, position, W, BN, FLAT)
        at = gl.where((tile < RT) & (age <= reach), new + (own - age).to(gl.int64) * D, at)
    # Weights of 0 do not hide what memory that was never written may hold.
    at = gl.where(visible(tile, position, seen, W, BN, FLAT), at, mine)
    at = gl.expand_dims(gl.convert_layout(at, gl.SliceLayout(1, L)), 1)
    dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, L)), 0)
    async_copy.async_copy_global_to_shared(to, at + dims)
    async_copy.commit_group()


@gluon.jit
def attend(
    query, buffers, own, where, first, stop, position, slot, reach, seen, rings, pool, new, rows,
    listed, table, width, scale, H: gl.constexpr, D: gl.constexpr, W: gl.constexpr,
    BN: gl.constexpr, PER: gl.constexpr, LISTED: gl.constexpr, NEW: gl.constexpr,
    L: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Sum tiles `first .. stop-1` of one query. Returns maximum, sum, weighted sum.

    `query` may still be on its way.
    """
    RT: gl.constexpr = (W + BN - 1) // BN
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    m = gl.full([H], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    none = gl.zeros([H, BN], gl.float32, SCORES)
    # Each half of the warps sums its own half of the keys.
    total = gl.sum(gl.reshape(none, [H, 2, BN // 2]), 2)
    acc = gl.zeros([H, D], gl.float32, SUMS)
    row = entry_rows(first, where, rows, listed, table, width, RT, BN, PER, LISTED, FLAT)
    fetch(buffers.index(0), first, row, own, position, slot, reach, seen, rings, pool, new, D, W,
          BN, PER, LISTED, NEW, FLAT, L)  # fmt: skip
    row = entry_rows(first + 1, where, rows, listed, table, width, RT, BN, PER, LISTED, FLAT)
    for tile in range(first, stop):
        kv = buffers.index((tile - first) % 2)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        z = warpgroup_mma(query, kv.permute((1, 0)), none, use_acc=False, is_async=True)
        if tile + 1 < stop:
            fetch(buffers.index((tile + 1 - first) % 2), tile + 1, row, own, position, slot, reach,
                  seen, rings, pool, new, D, W, BN, PER, LISTED, NEW, FLAT, L)  # fmt: skip
        row = entry_rows(tile + 2, where, rows, listed, table, width, RT, BN, PER, LISTED, FLAT)
        ok = visible(tile, position, seen, W, BN, gl.SliceLayout(0, SCORES))
        z = warpgroup_mma_wait(0, deps=[z])
        z = gl.where(gl.expand_dims(ok, 0), z, float("-inf"))
        high = gl.maximum(m, gl.max(z, 1) * scale)
        p = gl.exp2(gl.fma(z, none + scale, none - gl.expand_dims(high, 1)))
        old = gl.exp2(m - high)
        m = high
        weights = gl.convert_layout(p.to(kv.dtype), gl.DotOperandLayout(0, SUMS, 2))
        both = gl.sum(gl.reshape(p, [H, 2, BN // 2]), 2)
        factor = gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, both.type.layout)), 1)
        total = gl.fma(total, factor + gl.zeros_like(total), both)
        old = gl.expand_dims(gl.convert_layout(old, gl.SliceLayout(1, SUMS)), 1)
        acc = warpgroup_mma(weights, kv, acc * old, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    return m, gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES)), acc


@gluon.jit
def fold(m, total, m_part, total_part):
    """Join a part's maximum and sum to those so far; also the weights of both parts' sums."""
    high = gl.maximum(m, m_part)
    a, b = gl.exp2(m - high), gl.exp2(m_part - high)
    return high, gl.fma(total, a, total_part * b), a, b


@gluon.jit
def turned_back(x, t, turns, H: gl.constexpr, D: gl.constexpr, RD: gl.constexpr):
    """Rotate the last RD of D dims by the negative angle."""
    even, odd = gl.split(gl.reshape(x, [H, D // 2, 2]))
    L: gl.constexpr = even.type.layout
    pair = gl.arange(0, D // 2, gl.SliceLayout(0, L)) - (D - RD) // 2
    at = turns + t.to(gl.int64) * RD + 2 * pair
    flat = gl.zeros([H, D // 2], gl.float32, L)
    cos = gl.expand_dims(gl.load(at, mask=pair >= 0, other=1.0), 0) + flat
    sin = gl.expand_dims(gl.load(at + 1, mask=pair >= 0, other=0.0), 0) + flat
    real = gl.fma(even, cos, odd * sin)
    imaginary = gl.fma(odd, cos, -(even * sin))
    return gl.convert_layout(gl.reshape(gl.join(real, imaginary), [H, D]), x.type.layout)


@gluon.jit
def read_query(to, q, t, block, HEADS, H: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Start copying a query's heads, `[H, D]`."""
    head = block * H + gl.arange(0, H, gl.SliceLayout(1, L))
    dims = gl.arange(0, D, gl.SliceLayout(0, L))
    at = q + t.to(gl.int64) * HEADS * D + gl.expand_dims(head, 1) * D + gl.expand_dims(dims, 0)
    async_copy.async_copy_global_to_shared(to, at, mask=gl.expand_dims(head < HEADS, 1))
    async_copy.commit_group()


@gluon.jit
def write_rows(to, x, through, first, count, D: gl.constexpr, L: gl.constexpr):
    """Store `[H, D]` as rows `first ..` of D values, only those below `count`, in whole lines."""
    barrier()
    through.store(x)
    barrier()
    x = through.load(L)
    row = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, L))
    dims = gl.arange(0, D, gl.SliceLayout(0, L))
    at = gl.expand_dims(row, 1) * D + gl.expand_dims(dims, 0)
    gl.store(to + at, x, mask=gl.expand_dims(row < count, 1))


@gluon.jit
def decode_kernel(
    q, rings, pool, rows, table, seen, slots, positions, sink, turns, out, parts, stats, listed,
    width, scale, HEADS, H: gl.constexpr, D: gl.constexpr, RD: gl.constexpr, W: gl.constexpr,
    BN: gl.constexpr, PER: gl.constexpr, LISTED: gl.constexpr, SPLIT: gl.constexpr,
    ALONE: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """Grid (head blocks, parts, T): one part; the whole where there is but one (`ALONE`)."""
    begin(EARLY)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32] if D >= 256 else [2, 16], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BN // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    RT: gl.constexpr = (W + BN - 1) // BN
    block, part, t = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    entries = gl.load(seen + t).to(gl.int32)
    if LISTED:
        entries = gl.minimum(entries, listed)
    tiles = RT + gl.cdiv(entries, BN)
    if part * SPLIT < tiles:
        kind: gl.constexpr = q.dtype.element_ty
        query = gl.allocate_shared_memory(kind, [H, D], SHARED)
        read_query(query, q, t, block, HEADS, H, D, L)
        buffers = gl.allocate_shared_memory(kind, [2, BN, D], SHARED)
        m, total, acc = attend(
            query, buffers, t, t, part * SPLIT, gl.minimum(part * SPLIT + SPLIT, tiles),
            gl.load(positions + t).to(gl.int32), gl.load(slots + t), 0, entries, rings, pool,
            rings, rows, listed, table, width, scale, H, D, W, BN, PER, LISTED, False, L, SCORES,
            SUMS,
        )  # fmt: skip
        lane = gl.arange(0, H, gl.SliceLayout(1, SCORES))
        if ALONE:
            head = block * H + lane
            logit = gl.load(sink + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
            one = gl.full([H], 1.0, gl.float32, gl.SliceLayout(1, SCORES))
            m, total, _, b = fold(logit, one, m, total)
            b = gl.expand_dims(gl.convert_layout(b, gl.SliceLayout(1, SUMS)), 1)
            total = gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
            o = turned_back(acc * b / total, t, turns, H, D, RD)
            first = t.to(gl.int64) * HEADS
            o = o.to(out.dtype.element_ty)
            write_rows(out, o, buffers.index(0), first + block * H, first + HEADS, D, L)
        else:
            at = (t.to(gl.int64) * gl.num_programs(1) + part) * gl.num_programs(0) + block
            wide = buffers._reinterpret(gl.float32, [H, D], gl.NVMMASharedLayout(128, 32))
            write_rows(parts, acc, wide, at * H, at * H + H, D, L)
            gl.store(stats + 2 * (at * H + lane), m)
            gl.store(stats + 2 * (at * H + lane) + 1, total)


@gluon.jit
def prefill_kernel(
    q, new, rings, pool, rows, table, seen, slots, positions, starts, sequences, sink, turns, out,
    scratch, listed, width, scale, T, FIRST, HEADS, H: gl.constexpr, D: gl.constexpr, RD: gl.constexpr,
    W: gl.constexpr, BN: gl.constexpr, PER: gl.constexpr, LISTED: gl.constexpr,
    SPLIT: gl.constexpr, NEW: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """Each program takes queries one after the other; `scratch` holds its folded parts.

    Query 0 is row `FIRST` of `new`. Without NEW, queries decode: their keys are in rings, and each is a
    sequence of its own.
    """
    begin(EARLY)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32] if D >= 256 else [2, 16], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BN // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    RT: gl.constexpr = (W + BN - 1) // BN
    kind: gl.constexpr = q.dtype.element_ty
    query = gl.allocate_shared_memory(kind, [H, D], SHARED)
    buffers = gl.allocate_shared_memory(kind, [2, BN, D], SHARED)
    lane = gl.arange(0, H, gl.SliceLayout(1, SCORES))
    kept = scratch + (gl.program_id(0).to(gl.int64) * H * D)
    kept += gl.expand_dims(gl.arange(0, H, gl.SliceLayout(1, SUMS)), 1) * D
    kept += gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, SUMS)), 0)
    blocks = gl.cdiv(HEADS, H)
    for item in range(gl.program_id(0), T * blocks, gl.num_programs(0)):
        t, block = item // blocks, item % blocks
        head = block * H + lane
        entries = gl.load(seen + t).to(gl.int32)
        position = gl.load(positions + t).to(gl.int32)
        if LISTED:
            entries = gl.minimum(entries, listed)
        tiles = RT + gl.cdiv(entries, BN)
        where, own = t, FIRST + t
        if NEW and not LISTED:
            where = gl.load(sequences + t).to(gl.int32)
        barrier()
        read_query(query, q, t, block, HEADS, H, D, L)
        m = gl.load(sink + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
        total = gl.full([H], 1.0, gl.float32, gl.SliceLayout(1, SCORES))
        for first in range(0, tiles, SPLIT):
            high, part, acc = attend(
                query, buffers, own, where, first, gl.minimum(first + SPLIT, tiles), position,
                gl.load(slots + t), position - gl.load(starts + t).to(gl.int32), entries, rings,
                pool, new, rows, listed, table, width, scale, H, D, W, BN, PER, LISTED, NEW, L,
                SCORES, SUMS,
            )  # fmt: skip
            m, total, a, b = fold(m, total, high, part)
            a = gl.expand_dims(gl.convert_layout(a, gl.SliceLayout(1, SUMS)), 1)
            b = gl.expand_dims(gl.convert_layout(b, gl.SliceLayout(1, SUMS)), 1)
            acc = acc * b
            if first > 0:
                acc = gl.fma(gl.load(kept), gl.zeros([H, D], gl.float32, SUMS) + a, acc)
            if first + SPLIT < tiles:
                gl.store(kept, acc)
            else:
                over = gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
                o = turned_back(acc / over, t, turns, H, D, RD)
                start = t.to(gl.int64) * HEADS
                o = o.to(out.dtype.element_ty)
                write_rows(out, o, buffers.index(0), start + block * H, start + HEADS, D, L)
