"""Triton source shared by decode and prefill attention: one query and up to 64 heads a program.

A query's keys are tiles: first the ring by slot, then the entries in order. Runs of `SPLIT` tiles
are summed apart and folded in order, starting from the sink. Both boundaries depend on the query's
own keys alone, so its bits are the same in any batch, in decoding and in prefill; products and
sums that several kernels must round alike are spelled as `fma`.

Legend: T queries, H heads, D head_dim, RD rotary dims, W ring slots, BN keys of a tile, RT ring
tiles, S sequences with a block table, K listed entries of a query.
"""

from __future__ import annotations

from whalepod.kernels.jit import INTERPRETED, jit, tl
from whalepod.kernels.overlap import begin

# Its interpreter multiplies raw bits of bf16 operands.
WIDE = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit
def entry_rows(
    tile, t, rows, listed, table, width, seen, RT: tl.constexpr, BN: tl.constexpr,
    PER: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Flat pool row of each entry of a tile; 0 where there is none, as in all ring tiles."""
    entry = (tile - RT) * BN + tl.arange(0, BN)
    real = (entry >= 0) & (entry < seen)
    if LISTED:
        return tl.load(rows + t.to(tl.int64) * listed + entry, mask=real, other=0).to(tl.int64)
    block = tl.load(table + width * t.to(tl.int64) + entry // PER, mask=real, other=0)
    return block.to(tl.int64) * PER + entry % PER


@jit
def ring_age(tile, position, W: tl.constexpr, BN: tl.constexpr):
    """Of each slot of a ring tile: how many positions its key lies before the query."""
    slot = tile * BN + tl.arange(0, BN)
    return (position + W - slot) % W


@jit
def visible(tile, position, seen, W: tl.constexpr, BN: tl.constexpr, RT: tl.constexpr):
    """Which keys of a tile the query sees."""
    slot = tile * BN + tl.arange(0, BN)
    in_ring = (slot < W) & (ring_age(tile, position, W, BN) <= position)
    return tl.where(tile < RT, in_ring, slot - RT * BN < seen)


@jit
def product(a, b, acc=None):
    """`a @ b` in fp32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def soften(z, ok, m, total, scale):
    """Online softmax in base 2: new maximum and sum, weights, and the factor of the old sums."""
    z = tl.where(ok[None, :], z, float("-inf"))
    high = tl.maximum(m, tl.max(z, 1) * scale)
    p = tl.exp2(tl.fma(z, tl.zeros_like(z) + scale, tl.zeros_like(z) - high[:, None]))
    old = tl.exp2(m - high)
    return high, tl.fma(total, old, tl.sum(p, 1)), p, old


@jit
def fold(m, total, m_part, total_part):
    """Join a part's maximum and sum to those so far; also the weights of both parts' sums."""
    high = tl.maximum(m, m_part)
    a, b = tl.exp2(m - high), tl.exp2(m_part - high)
    return high, tl.fma(total, a, total_part * b), a[:, None], b[:, None]


@jit
def turned_back(x, t, turns, H: tl.constexpr, D: tl.constexpr, RD: tl.constexpr):
    """Rotate the last RD of D dims by the negative angle."""
    pair = tl.arange(0, D // 2) - (D - RD) // 2
    at = turns + t.to(tl.int64) * RD + 2 * pair
    cos = tl.load(at, mask=pair >= 0, other=1.0)[None, :] + tl.zeros([H, D // 2], tl.float32)
    sin = tl.load(at + 1, mask=pair >= 0, other=0.0)[None, :] + tl.zeros([H, D // 2], tl.float32)
    even, odd = tl.split(tl.reshape(x, [H, D // 2, 2]))
    real = tl.fma(even, cos, odd * sin)
    imaginary = tl.fma(odd, cos, -(even * sin))
    return tl.reshape(tl.join(real, imaginary), [H, D])


@jit
def attend(
    q, t, own, sequence, first, stop, position, slot, reach, seen, rings, pool, new, rows, listed,
    table, width, scale, H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    PER: tl.constexpr, LISTED: tl.constexpr, NEW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum tiles `first .. stop-1` of one query; plain rows. Returns maximum, sum, weighted sum.

    `own` is the query's row of `new`; `reach` of the rows before it are its predecessors.
    """
    RT: tl.constexpr = (W + BN - 1) // BN
    dims = tl.arange(0, D)
    m = tl.full([H], float("-inf"), tl.float32)
    total = tl.zeros([H], tl.float32)
    acc = tl.zeros([H, D], tl.float32)
    where = t if LISTED else sequence
    row = entry_rows(first, where, rows, listed, table, width, seen, RT, BN, PER, LISTED)
    for tile in tl.range(first, stop, num_stages=STAGES):
        ok = visible(tile, position, seen, W, BN, RT)
        in_ring = slot.to(tl.int64) * W + tile * BN + tl.arange(0, BN)
        at = tl.where(tile < RT, rings + in_ring * D, pool + row * D)
        if NEW:
            age = ring_age(tile, position, W, BN)
            at = tl.where((tile < RT) & (age <= reach), new + (own - age).to(tl.int64) * D, at)
        kv = tl.load(at[:, None] + dims[None, :], mask=ok[:, None], other=0.0)
        # Rows of the next tile are on their way while this one is multiplied.
        row = entry_rows(tile + 1, where, rows, listed, table, width, seen, RT, BN, PER, LISTED)
        p, old = tl.zeros([H, BN], kv.dtype), tl.zeros([H], tl.float32)
        # Always so: behind a branch the compiler does not see that another product follows, and
        # spreads the keys over all warps instead of giving each warp group all of them.
        if stop > first:
            z = product(q, tl.trans(kv))
            m, total, p, old = soften(z, ok, m, total, scale)
            p = p.to(kv.dtype)
        acc = product(p, kv, acc * old[:, None])
    return m, total, acc


@jit
def decode_kernel(
    q, rings, pool, rows, table, seen, slots, positions, sink, turns, out, parts, stats, listed,
    width, scale, HEADS, H: tl.constexpr, D: tl.constexpr, RD: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, PER: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    ALONE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (head blocks, parts, T): one part; the whole where there is but one (`ALONE`)."""
    begin(EARLY)
    RT: tl.constexpr = (W + BN - 1) // BN
    block, part, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entries = tl.load(seen + t).to(tl.int32)
    if LISTED:
        entries = tl.minimum(entries, listed)
    tiles = RT + tl.cdiv(entries, BN)
    if part * SPLIT < tiles:
        head = block * H + tl.arange(0, H)
        place = (t.to(tl.int64) * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
        real = (head < HEADS)[:, None]
        m, total, acc = attend(
            tl.load(q + place, mask=real, other=0.0), t, t, t, part * SPLIT,
            tl.minimum(part * SPLIT + SPLIT, tiles), tl.load(positions + t).to(tl.int32),
            tl.load(slots + t),
            0, entries, rings, pool, rings, rows, listed, table, width, scale, H, D, W, BN, PER,
            LISTED, False, STAGES,
        )  # fmt: skip
        if ALONE:
            logit = tl.load(sink + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
            m, total, _, b = fold(logit, tl.full([H], 1.0, tl.float32), m, total)
            o = turned_back(acc * b / total[:, None], t, turns, H, D, RD)
            tl.store(out + place, o.to(out.dtype.element_ty), mask=real)
        else:
            at = (t.to(tl.int64) * tl.num_programs(1) + part) * tl.num_programs(0) + block
            lane = at * H + tl.arange(0, H)
            tl.store(parts + lane[:, None] * D + tl.arange(0, D)[None, :], acc)
            tl.store(stats + 2 * lane, m)
            tl.store(stats + 2 * lane + 1, total)


@jit
def combine_kernel(
    parts, stats, seen, most, sink, turns, out, count, blocks, HEADS, HB: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, RD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (head blocks of HB, T): fold the parts of a query in order, starting from the sink."""
    begin(EARLY)
    RT: tl.constexpr = (W + BN - 1) // BN
    t = tl.program_id(1)
    head = tl.program_id(0) * HB + tl.arange(0, HB)
    dims = tl.arange(0, D)
    used = tl.cdiv(RT + tl.cdiv(tl.minimum(tl.load(seen + t), most), BN), SPLIT)
    m = tl.load(sink + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
    total = tl.full([HB], 1.0, tl.float32)
    acc = tl.zeros([HB, D], tl.float32)
    for part in tl.range(0, used):
        at = (t.to(tl.int64) * count + part) * blocks
        lane = (at + head // H) * H + head % H
        value = tl.load(parts + lane[:, None] * D + dims[None, :])
        m, total, a, b = fold(m, total, tl.load(stats + 2 * lane), tl.load(stats + 2 * lane + 1))
        acc = tl.fma(acc, a + tl.zeros_like(acc), value * b)
    o = turned_back(acc / total[:, None], t, turns, HB, D, RD).to(out.dtype.element_ty)
    place = (t.to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
    tl.store(out + place, o, mask=(head < HEADS)[:, None])


@jit
def prefill_kernel(
    q, new, rings, pool, rows, table, seen, slots, positions, starts, sequences, sink, turns, out,
    scratch, listed, width, scale, T, FIRST, HEADS, H: tl.constexpr, D: tl.constexpr, RD: tl.constexpr,
    W: tl.constexpr, BN: tl.constexpr, PER: tl.constexpr, LISTED: tl.constexpr,
    SPLIT: tl.constexpr, NEW: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Each program takes queries one after the other; `scratch` holds its folded parts.

    Query 0 is row `FIRST` of `new`. Without NEW, queries decode: their keys are in rings, and each is a
    sequence of its own.
    """
    begin(EARLY)
    RT: tl.constexpr = (W + BN - 1) // BN
    lane = tl.arange(0, H)
    dims = tl.arange(0, D)[None, :]
    kept = scratch + (tl.program_id(0).to(tl.int64) * H + lane)[:, None] * D + dims
    blocks = tl.cdiv(HEADS, H)
    for item in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        t, head = item // blocks, item % blocks * H + lane
        real = (head < HEADS)[:, None]
        place = (tl.full([], 0, tl.int64) + t) * HEADS * D + head[:, None] * D + dims
        entries = tl.load(seen + t).to(tl.int32)
        position = tl.load(positions + t).to(tl.int32)
        if LISTED:
            entries = tl.minimum(entries, listed)
        tiles = RT + tl.cdiv(entries, BN)
        query = tl.load(q + place, mask=real, other=0.0)
        m = tl.load(sink + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
        total = tl.full([H], 1.0, tl.float32)
        for first in range(0, tiles, SPLIT):
            high, part, acc = attend(
                query, t, FIRST + t, tl.load(sequences + t) if NEW else t, first,
                tl.minimum(first + SPLIT, tiles), position, tl.load(slots + t),
                position - tl.load(starts + t).to(tl.int32), entries, rings, pool, new, rows, listed,
                table, width, scale, H, D, W, BN, PER, LISTED, NEW, STAGES,
            )  # fmt: skip
            m, total, a, b = fold(m, total, high, part)
            acc = acc * b
            if first > 0:
                acc = tl.fma(tl.load(kept), a + tl.zeros_like(acc), acc)
            if first + SPLIT < tiles:
                tl.store(kept, acc)
                tl.debug_barrier()
            else:
                o = turned_back(acc / total[:, None], t, turns, H, D, RD)
                tl.store(out + place, o.to(out.dtype.element_ty), mask=real)
