"""Index scores on GPUs: keys widened in registers, one product a tile of keys.

Legend: T queries, H index heads, I index_head_dim, E entries, BN keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.kernels.attention_triton import WIDE, product
from whalepod.kernels.decode_attention_triton import processors
from whalepod.kernels.index_scores import KeyFormat, index_scores
from whalepod.kernels.jit import INTERPRETED, jit, on_hopper, runs, tl, triton
from whalepod.kernels.overlap import begin, early

# Programs that fill a GPU, three on each processor. Where keys lie as rows, Hopper's kernel holds four tiles
# of them: small ones, so that a processor has room for two programs, and no more programs than find room.
_PROGRAMS, _KEYS, _ROWS = 396, 128, 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """Keys of a tile (0: as suits their format), tiles of a program (0: as many as share a row out evenly), warps."""

    keys: int = 0
    run: int = 0
    warps: int = 4
    gluon: bool = True


# E2M1 pairs to bf16: magnitude bits below the exponent's lowest, the sign on top, times the scale.
_PAIR = """
shl.b32 t, {from}, {up}; shl.b32 u, {from}, {sign};
and.b32 t, t, 0x01C001C0; and.b32 u, u, 0x80008000; or.b32 t, t, u;
mul.rn.bf16x2 {to}, t, $5;
"""
FP4_TO_BF16 = "".join(
    [
        "{ .reg .b32 a, b, t, u; prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;",
        *(
            _PAIR.format_map({"from": source, "to": to, "up": up, "sign": sign})
            for source, to, up, sign in [
                ("a", "$0", 6, 12),
                ("b", "$1", 6, 12),
                ("a", "$2", 2, 8),
                ("b", "$3", 2, 8),
            ]
        ),
        "}",
    ]
)
# E4M3 to bf16: the exponent's bias differs by 120.
FP8_TO_BF16 = """{ .reg .b32 a, b, c, k;
mov.b32 k, 0x7B807B80;
prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
and.b32 c, a, 0x80008000; shr.b32 a, a, 4; and.b32 a, a, 0x07F007F0; or.b32 a, a, c;
mul.rn.bf16x2 $0, a, k;
and.b32 c, b, 0x80008000; shr.b32 b, b, 4; and.b32 b, b, 0x07F007F0; or.b32 b, b, c;
mul.rn.bf16x2 $1, b, k; }"""
if tl is not None:
    FP4_TO_BF16, FP8_TO_BF16 = tl.constexpr(FP4_TO_BF16), tl.constexpr(FP8_TO_BF16)


@jit
def widened_fp4(codes, scales):
    """E2M1 pairs `[BN, 4, 16]` with E8M0 scales `[BN, 4]`: even and odd dims, times 2^-26.

    So one product undoes both offsets of the exponents, and cannot overflow.
    """
    exponent = scales.to(tl.int32) + 100
    if WIDE:
        wide = codes.to(tl.int32)
        factor = (exponent << 23).to(tl.float32, bitcast=True)[:, :, None]
        even = (((wide & 7) << 22) | ((wide & 8) << 28)).to(tl.float32, bitcast=True) * factor
        odd = (((wide & 112) << 18) | ((wide & 128) << 24)).to(tl.float32, bitcast=True) * factor
    else:
        twice = exponent << 7 | exponent << 23
        twice = twice[:, :, None] + tl.zeros_like(codes).to(tl.int32)
        even, odd = tl.inline_asm_elementwise(
            FP4_TO_BF16,
            "=r,=r,=r,=r,r,r,r,r,r",
            [codes, twice],
            (tl.bfloat16, tl.bfloat16),
            True,
            4,
        )
    return even, odd


@jit
def widened_fp8(codes):
    """E4M3 codes as numbers."""
    if WIDE:
        wide = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(FP8_TO_BF16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    return wide


@jit
def blocks_of(entry, seen, table, PER: tl.constexpr):
    """Block of each entry; 0 beyond those seen."""
    return tl.load(table + entry // PER, mask=entry < seen, other=0).to(tl.int64)


@jit
def read_keys(entry, block, seen, keys, STRIDE: tl.constexpr, DIM: tl.constexpr,
              PER: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Data and scales of a tile of entries as they are stored."""
    real = entry < seen
    place = entry % PER
    dims = tl.arange(0, DIM)[None, :]
    if KIND == "fp4":
        group, inside = tl.arange(0, DIM // 32)[None, :], tl.arange(0, 16)[None, None, :]
        at = (keys + block * STRIDE + place * (DIM // 2))[:, None] + 16 * group
        data = tl.load(at[:, :, None] + inside, mask=real[:, None, None], other=0)
        at = (keys + block * STRIDE + PER * (DIM // 2) + place * (DIM // 32))[:, None] + group
        scales = tl.load(at, mask=real[:, None], other=0)
    elif KIND == "fp8":
        at = (keys + block * STRIDE + place * DIM)[:, None] + dims
        data = tl.load(at, mask=real[:, None], other=0)
        wide = (keys + block * STRIDE + PER * DIM).to(tl.pointer_type(tl.float32))
        scales = tl.load(wide + place, mask=real, other=0.0)
    else:
        row = keys + (block * PER + place) * DIM
        data = tl.load(row[:, None] + dims, mask=real[:, None], other=0.0)
        scales = 0
    return data, scales


@jit
def scores_kernel(
    q, gate, keys, table, sequences, seen, out, width, E, HEADS, RUN, step, factor, STRIDE: tl.constexpr,
    H: tl.constexpr, DIM: tl.constexpr, PER: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
    OWN: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Grid (runs of tiles, T). The next tile's keys are on their way while one is multiplied."""
    begin(EARLY)
    t = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * RUN * BN
    count = tl.load(seen + t).to(tl.int32)
    lane = tl.arange(0, BN)
    stop = tl.minimum(first + RUN * BN, count)
    for at in range(
        tl.maximum(first, tl.cdiv(count, BN) * BN), tl.minimum(first + RUN * BN, E), BN
    ):
        tl.store(out + t * E + at + lane, float("-inf"), mask=at + lane < E)
    if first < count:
        head = tl.arange(0, H)
        g = tl.load(gate + t * step + head, mask=head < HEADS, other=0.0).to(tl.float32) * factor
        if OWN:
            table += t * width
        else:
            table += tl.load(sequences + t).to(tl.int64) * width
        mine = q + t * HEADS * DIM + head[:, None] * DIM
        own = (head < HEADS)[:, None]
        if KIND == "fp4":
            half = tl.arange(0, DIM // 2)[None, :]
            low = tl.load(mine + 2 * half, mask=own, other=0.0)
            high = tl.load(mine + 2 * half + 1, mask=own, other=0.0)
            g = g * 67108864.0
        else:
            query = tl.load(mine + tl.arange(0, DIM)[None, :], mask=own, other=0.0)
        block = blocks_of(first + lane, count, table, PER)
        k, s = read_keys(first + lane, block, count, keys, STRIDE, DIM, PER, KIND)
        block = blocks_of(first + BN + lane, count, table, PER)
        for at in tl.range(first, stop, BN, num_stages=1):
            entry = at + lane
            ahead, scales = read_keys(entry + BN, block, count, keys, STRIDE, DIM, PER, KIND)
            block = blocks_of(entry + 2 * BN, count, table, PER)
            if KIND == "fp4":
                even, odd = widened_fp4(k, s)
                z = product(tl.reshape(even, [BN, DIM // 2]), tl.trans(low))
                z = product(tl.reshape(odd, [BN, DIM // 2]), tl.trans(high), z)
            elif KIND == "fp8":
                z = product(widened_fp8(k), tl.trans(query))
            else:
                z = product(k, tl.trans(query))
            score = tl.sum(tl.maximum(z, 0.0) * g[None, :], 1)
            if KIND == "fp8":
                score *= s
            score = tl.where(entry < count, score, float("-inf"))
            tl.store(out + t * E + entry, score, mask=entry < E)
            k, s = ahead, scales


@index_scores.twin("triton", runs)
def _scores(
    q_THI: Tensor,
    gate_TH: Tensor,
    keys: Tensor,
    kind: KeyFormat,
    per: int,
    table_SB: Tensor,
    sequences_T: Tensor | None,
    seen_T: Tensor,
    scale: float = 1.0,
    tiles: Tiles | None = None,
) -> Tensor:
    if not (INTERPRETED or q_THI.dtype == torch.bfloat16):
        return index_scores.reference(
            q_THI, gate_TH, keys, kind, per, table_SB, sequences_T, seen_T, scale
        )
    tiles = tiles or Tiles()
    t, heads, dims = q_THI.shape
    e = table_SB.shape[1] * per
    out = torch.empty(t, e, dtype=torch.float32, device=q_THI.device)
    source, programs, keys_of_tile = scores_kernel, _PROGRAMS, tiles.keys or _KEYS
    if tiles.gluon and dims == 128 and on_hopper(q_THI.device):
        from whalepod.kernels import index_scores_gluon  # noqa: PLC0415 - for Hopper alone

        source = index_scores_gluon.scores_kernel
        if kind == "rows":
            programs, keys_of_tile = 2 * processors(q_THI.device), tiles.keys or _ROWS
    run = tiles.run or min(16, max(1, triton.cdiv(t * triton.cdiv(e, keys_of_tile), programs)))
    source[(triton.cdiv(e, keys_of_tile * run), t)](
        q_THI, gate_TH, keys, table_SB, sequences_T, seen_T, out, table_SB.shape[1], e, heads, run,
        gate_TH.stride(0), scale,
        STRIDE=keys.stride(0), H=max(16, triton.next_power_of_2(heads)), DIM=dims, PER=per,
        KIND=kind, BN=keys_of_tile, num_warps=tiles.warps, OWN=sequences_T is None,
        **early(),
    )  # fmt: skip
    return out
