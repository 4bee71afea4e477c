"""The kernels of `fp4_experts_triton` in Gluon for Hopper: fewer instructions around the decoding.

What limits these products is the issue of instructions as much as the memory: four bits become sixteen in
registers. So a turn of the loop takes two blocks of columns, its copies are one group, and the programs of
a processor take turns in decoding and multiplying. Cuts and the order of sums are those of
`fp4_experts_triton`, and so are the bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from whalepod.kernels.overlap_gluon import barrier, begin

# Each takes a word's two codes of one group of 32 columns to bf16, times the group's scale.
_GROUP_0 = gl.constexpr("{\n.reg .b32 t;\nand.b32 t, $1, 0x81C081C0;\nmul.rn.bf16x2 $0, t, $2;\n}")
_GROUP_1 = gl.constexpr(
    "{\n.reg .b32 t;\nshl.b32 t, $1, 4;\nand.b32 t, t, 0x81C081C0;\nmul.rn.bf16x2 $0, t, $2;\n}"
)
_GROUP_2 = gl.constexpr(
    "{\n.reg .b32 t;\nshf.l.wrap.b32 t, $1, $1, 26;\nand.b32 t, t, 0x81C081C0;\nmul.rn.bf16x2 $0, t, $2;\n}"
)
_GROUP_3 = gl.constexpr(
    """{
    .reg .b32 t, u;
    shl.b32 t, $1, 6;
    and.b32 t, t, 0x80C080C0;
    shr.u32 u, $1, 2;
    and.b32 u, u, 0x01000100;
    or.b32 t, t, u;
    mul.rn.bf16x2 $0, t, $2;
    }"""
)


@gluon.jit
def group(words, scales, G: gl.constexpr, ASM: gl.constexpr):
    """Words `[N, 32]` int16 and scales `[N]` int32 to the G-th group of 32 columns, bf16."""
    factor = ((scales >> (8 * G)) & 0xFF) * 0x00800080  # the exponent of either half of a register
    each = gl.full(words.shape, 0, gl.int32, words.type.layout) + gl.expand_dims(factor, 1)
    return gl.inline_asm_elementwise(ASM, "=r,r,r,r", [words, each], gl.bfloat16, True, 2)


@gluon.jit
def widened(codes, scales, block, WORDS: gl.constexpr):
    """A block's codes as `[N, 128]` bf16. No value moves to another thread: groups are registers, in turn."""
    words = codes.index(block).load(WORDS)
    factors = scales.index(block).load(gl.SliceLayout(1, WORDS))
    a, b = group(words, factors, 0, _GROUP_0), group(words, factors, 1, _GROUP_1)
    c, d = group(words, factors, 2, _GROUP_2), group(words, factors, 3, _GROUP_3)
    whole = gl.permute(gl.join(gl.join(a, b), gl.join(c, d)), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(whole, [words.shape[0], 128]), WORDS)


@gluon.jit
def fetch(w, ws, codes, scales, stage, STEP: gl.constexpr):
    """Start copying two blocks of codes and scales to a stage."""
    for b in gl.static_range(2):
        async_copy.async_copy_global_to_shared(codes.index(stage * 2 + b), w + b * STEP * 32)
        async_copy.async_copy_global_to_shared(scales.index(stage * 2 + b), ws + b * STEP)


@gluon.jit
def products(
    x, w, ws, live, STEP: gl.constexpr, PAIRS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, TOGETHER: gl.constexpr, ACC: gl.constexpr, EARLY: gl.constexpr,
    ALONGSIDE: gl.constexpr,
):  # fmt: skip
    """`[BN, BM]`: a tile of a matrix with a block's inputs; columns of rows that are not real are anything.

    Args:
        x: `[BM, 256]`, where the first two blocks of the inputs are. live: `[BM, 1]`.
        w, ws: `[BN, 32]` and `[BN]`, where the first block's codes and scales are. STEP: rows of a matrix.
        PAIRS: of blocks of columns. EARLY, ALONGSIDE: the kernel begins here, its first weights on their way.
    """
    WORDS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    codes = gl.allocate_shared_memory(gl.int16, [STAGES * 2, BN, 32], NARROW)
    inputs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 256], WIDE)
    halves = inputs._reinterpret(gl.bfloat16, [STAGES * 2, BM, 128], WIDE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.int32, [STAGES * 2, BN], flat)
    for s in gl.static_range(STAGES - 1):
        if s < PAIRS:
            fetch(w + s * STEP * 64, ws + s * STEP * 2, codes, scales, s, STEP)
    begin(EARLY, ALONGSIDE)
    for s in gl.static_range(STAGES - 1):
        if s < PAIRS:
            async_copy.async_copy_global_to_shared(inputs.index(s), x + s * 256, mask=live)
        async_copy.commit_group()
    x += (STAGES - 1) * 256
    w += (STAGES - 1) * STEP * 64
    ws += (STAGES - 1) * STEP * 2
    acc = gl.zeros([BN, BM], gl.float32, ACC)
    stage, free = 0, STAGES - 1
    for j in range(PAIRS):
        async_copy.wait_group(STAGES - 2)
        barrier()  # this pair is there for all, and all have multiplied the one before
        if j + STAGES - 1 < PAIRS:
            fetch(w, ws, codes, scales, free, STEP)
            async_copy.async_copy_global_to_shared(inputs.index(free), x, mask=live)
        async_copy.commit_group()  # an empty one, too: what is waited for is counted in groups
        x += 256
        w += STEP * 64
        ws += STEP * 2
        a = widened(codes, scales, stage * 2, WORDS)
        if TOGETHER:
            b = widened(codes, scales, stage * 2 + 1, WORDS)
            acc = warpgroup_mma(a, halves.index(stage * 2).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(b, halves.index(stage * 2 + 1).permute((1, 0)), acc, is_async=True)
            acc, _a, _b = warpgroup_mma_wait(0, deps=[acc, a, b])
        else:
            acc = warpgroup_mma(a, halves.index(stage * 2).permute((1, 0)), acc, is_async=True)
            acc, _a = warpgroup_mma_wait(0, deps=[acc, a])
            b = widened(codes, scales, stage * 2 + 1, WORDS)
            acc = warpgroup_mma(b, halves.index(stage * 2 + 1).permute((1, 0)), acc, is_async=True)
            acc, _b = warpgroup_mma_wait(0, deps=[acc, b])
        free = stage
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return acc


@gluon.jit
def block_of(
    order, slots, starts, stops, used, block, EXPERTS: gl.constexpr, LEAST: gl.constexpr,
    BM: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """As `fp4_experts_triton._block`."""
    lane = gl.arange(0, BM, L)
    if EXPERTS > 0:
        expert = gl.load(slots + block).to(gl.int32)
        inside = (expert >= 0) & (expert < EXPERTS)
        slot = gl.load(order + gl.where(inside, expert, 0))
        slot = gl.where(inside, slot, -1)
        at, live, ours = block + lane, lane == 0, block >= 0
        row = block + lane * 0
    else:
        exist, slot = gl.load(used), gl.load(slots + block)  # at once: each waits for the memory
        start, stop = gl.load(starts + block), gl.load(stops + block)
        ours = (block < exist) & (stop - start > LEAST) & (stop - start <= BM)
        at, live = start + lane, start + lane < stop
        row = gl.load(order + at, mask=live & ours, other=0)
    return ours, slot, at, live, row


@gluon.jit
def gate_up_kernel(
    x, codes, scales, gain, weights, order, slots, starts, stops, used, inner,
    WIDTH: gl.constexpr, COLUMNS: gl.constexpr, TOP: gl.constexpr, LIMIT: gl.constexpr,
    TILES: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, LEAST: gl.constexpr,
    EXPERTS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, EARLY: gl.constexpr = False,
    ALONGSIDE: gl.constexpr = False,
):  # fmt: skip
    """As `fp4_experts_triton.gate_up_kernel`."""
    begin(EARLY, ALONGSIDE)
    if not EARLY:
        gdc_launch_dependents()  # `down` may come early all the same
    HALF: gl.constexpr = BN // 2
    BLOCKS: gl.constexpr = COLUMNS // 128
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    LX: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    LW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    ACROSS: gl.constexpr = 8 if HALF <= 32 else 16
    BOTH: gl.constexpr = gl.BlockedLayout(
        [2, 4, 1], [1, ACROSS, 32 // ACROSS], [1, 1, gl.num_warps()], [0, 1, 2]
    )
    block, tile = gl.program_id(0) // TILES, gl.program_id(0) % TILES
    ours, slot, at, live, row = block_of(
        order, slots, starts, stops, used, block, EXPERTS, LEAST, BM, gl.SliceLayout(1, LX)
    )
    if ours & (slot >= 0):
        first = slot.to(gl.int64) * (BLOCKS * 2 * WIDTH) + tile * HALF
        i, f = gl.arange(0, BN, gl.SliceLayout(1, LW)), gl.arange(0, BN, FLAT)
        w = codes + (first + i % HALF + i // HALF * WIDTH) * 32
        column = gl.arange(0, 32, gl.SliceLayout(0, LW))
        from_x = x + (row // TOP).to(gl.int64) * COLUMNS
        columns = gl.arange(0, 256, gl.SliceLayout(0, LX))
        acc = products(
            gl.expand_dims(from_x, 1) + gl.expand_dims(columns, 0),
            gl.expand_dims(w, 1) + gl.expand_dims(column, 0),
            scales + first + f % HALF + f // HALF * WIDTH, gl.expand_dims(live, 1), 2 * WIDTH,
            BLOCKS // 2, BN, BM, STAGES, TOGETHER, ACC, False, False,
        )  # fmt: skip
        kind: gl.constexpr = inner.dtype.element_ty
        acc = (acc * gl.load(gain + slot)).to(kind)
        both = gl.convert_layout(gl.reshape(acc, [2, HALF, BM]), BOTH)
        gate, up = gl.split(gl.permute(both, (1, 2, 0)))
        gate, up = gate.to(gl.float32), up.to(gl.float32)
        L: gl.constexpr = gate.type.layout
        own: gl.constexpr = gl.SliceLayout(0, L)
        gate = gl.where(gate > LIMIT, LIMIT, gate)  # unlike a minimum it leaves a NaN one
        up = gl.where(up > LIMIT, LIMIT, gl.where(up < -LIMIT, -LIMIT, up))
        small = gl.exp(-gl.abs(gate))  # of the sigmoid: never infinite
        out = gate * (gl.where(gate < 0, small, 1.0) / (1.0 + small)) * up
        pair, place = gl.convert_layout(row, own), gl.convert_layout(at, own).to(gl.int64)
        real = gl.convert_layout(live.to(gl.int32), own) != 0
        out *= gl.expand_dims(gl.load(weights + pair, mask=real, other=0.0), 0)
        n = tile * HALF + gl.arange(0, HALF, gl.SliceLayout(1, L))
        where = inner + gl.expand_dims(place * WIDTH, 0) + gl.expand_dims(n, 1)
        gl.store(where, out.to(kind), mask=gl.expand_dims(real, 0) & gl.expand_dims(n < WIDTH, 1))


@gluon.jit
def down_kernel(
    inner, codes, scales, gain, order, slots, starts, stops, used, out,
    D: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr, BN: gl.constexpr,
    BM: gl.constexpr, LEAST: gl.constexpr, EXPERTS: gl.constexpr, STAGES: gl.constexpr,
    TOGETHER: gl.constexpr, EARLY: gl.constexpr = False,
    ALONGSIDE: gl.constexpr = False,
):  # fmt: skip
    """As `fp4_experts_triton.down_kernel`. Before it waits for `gate_up` it reads what that one has, too."""
    BLOCKS: gl.constexpr = COLUMNS // 128
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    LX: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    LW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    L: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, gl.num_warps()], [0, 1])
    block, tile = gl.program_id(0) // TILES, gl.program_id(0) % TILES
    ours, slot, at, live, row = block_of(
        order, slots, starts, stops, used, block, EXPERTS, LEAST, BM, gl.SliceLayout(1, LX)
    )
    kind: gl.constexpr = out.dtype.element_ty
    own: gl.constexpr = gl.SliceLayout(0, L)
    n = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, L))
    to = gl.convert_layout(row, own).to(gl.int64)
    real = gl.convert_layout(live.to(gl.int32), own) != 0
    where = out + gl.expand_dims(to * D, 0) + gl.expand_dims(n, 1)
    inside = gl.expand_dims(real, 0) & gl.expand_dims(n < D, 1) & ours
    if ours & (slot >= 0):
        first = slot.to(gl.int64) * (BLOCKS * D) + tile * BN
        w = codes + (first + gl.arange(0, BN, gl.SliceLayout(1, LW))) * 32
        column = gl.arange(0, 32, gl.SliceLayout(0, LW))
        columns = gl.arange(0, 256, gl.SliceLayout(0, LX))
        acc = products(
            gl.expand_dims(inner + at.to(gl.int64) * COLUMNS, 1) + gl.expand_dims(columns, 0),
            gl.expand_dims(w, 1) + gl.expand_dims(column, 0),
            scales + first + gl.arange(0, BN, FLAT), gl.expand_dims(live, 1), D, BLOCKS // 2, BN,
            BM, STAGES, TOGETHER, ACC, EARLY, ALONGSIDE,
        )  # fmt: skip
        acc = (acc * gl.load(gain + slot)).to(kind)
        gl.store(where, gl.convert_layout(acc, L), mask=inside)
    else:
        begin(EARLY, ALONGSIDE)  # or what follows would come before what is waited for
        gl.store(where, gl.zeros([BN, BM], kind, L), mask=inside)
