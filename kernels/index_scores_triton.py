"""Index scores on GPUs: keys widened in registers, one product a tile of keys.

Legend: T queries, H index heads, I index_head_dim, E entries, BN keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.kernels.attention_triton import product
from whalepod.kernels.index_scores import SIZES, KeyFormat, index_scores
from whalepod.kernels.jit import INTERPRETED, jit, runs, tl, triton


@dataclass(frozen=True, slots=True)
class Tiles:
    """Keys of a tile, tiles of a program, and the program's warps and pipeline stages."""

    keys: int = 128
    run: int = 8
    warps: int = 4
    stages: int = 3


@jit
def widened_fp4(codes, scales, column):
    """E2M1 codes times their scales, times 2^-26: so one product undoes both offsets."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    exponent = ((scales[:, None] >> (column // 16 * 8)[None, :]) & 255) + 100
    return bits.to(tl.float32, bitcast=True) * (exponent << 23).to(tl.float32, bitcast=True)


@jit
def rows_of(entry, seen, table, PER: tl.constexpr):
    """Block and place in it of each entry; 0 beyond those seen."""
    block = tl.load(table + entry // PER, mask=entry < seen, other=0)
    return block.to(tl.int64), entry % PER


@jit
def scores_kernel(
    q, gate, keys, table, sequences, seen, out, width, E, HEADS, STRIDE: tl.constexpr,
    H: tl.constexpr, DIM: tl.constexpr, PER: tl.constexpr, KIND: tl.constexpr, DATA: tl.constexpr,
    BN: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (runs of tiles, T)."""
    t = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * RUN * BN
    count = tl.load(seen + t).to(tl.int32)
    lane = tl.arange(0, BN)
    stop = tl.minimum(first + RUN * BN, count)
    for at in range(tl.maximum(first, tl.cdiv(count, BN) * BN), tl.minimum(first + RUN * BN, E), BN):
        tl.store(out + t * E + at + lane, float("-inf"), mask=at + lane < E)
    if first < count:
        head = tl.arange(0, H)
        g = tl.load(gate + t * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)
        dims = tl.arange(0, DIM)
        table += tl.load(sequences + t).to(tl.int64) * width
        mine = q + t * HEADS * DIM + head[:, None] * DIM
        own = (head < HEADS)[:, None]
        half = tl.arange(0, DIM // 2)
        if KIND == "fp4":
            low = tl.load(mine + 2 * half[None, :], mask=own, other=0.0)
            high = tl.load(mine + 2 * half[None, :] + 1, mask=own, other=0.0)
            g = g * 67108864.0
        else:
            query = tl.load(mine + dims[None, :], mask=own, other=0.0)
        for at in tl.range(first, stop, BN, num_stages=STAGES):
            entry = at + lane
            real = entry < count
            block, place = rows_of(entry, count, table, PER)
            if KIND == "rows":
                row = keys + (block * PER + place) * DIM
                k = tl.load(row[:, None] + dims[None, :], mask=real[:, None], other=0.0)
            else:
                page = keys + block * STRIDE
                if KIND == "fp4":
                    data = page + place * DATA
                    k = tl.load(data[:, None] + half[None, :], mask=real[:, None], other=0)
                    s = tl.load((page + PER * DATA).to(tl.pointer_type(tl.int32)) + place, mask=real, other=0)
                else:
                    data = page + place * DATA
                    k = tl.load(data[:, None] + dims[None, :], mask=real[:, None], other=0)
                    s = tl.load((page + PER * DATA).to(tl.pointer_type(tl.float32)) + place, mask=real, other=0.0)
            if KIND == "fp4":
                wide = k.to(tl.int32)
                even = widened_fp4(wide & 15, s, half).to(q.dtype.element_ty)
                odd = widened_fp4(wide >> 4, s, half).to(q.dtype.element_ty)
                z = product(even, tl.trans(low))
                z = product(odd, tl.trans(high), z)
            elif KIND == "fp8":
                wide = k.to(tl.float8e4nv, bitcast=True).to(q.dtype.element_ty)
                z = product(wide, tl.trans(query))
            else:
                z = product(k, tl.trans(query))
            score = tl.sum(tl.maximum(z, 0.0) * g[None, :], 1)
            if KIND == "fp8":
                score *= s
            score = tl.where(real, score, float("-inf"))
            tl.store(out + t * E + entry, score, mask=entry < E)


@index_scores.twin("triton", runs)
def _scores(
    q_THI: Tensor,
    gate_TH: Tensor,
    keys: Tensor,
    kind: KeyFormat,
    per: int,
    table_SB: Tensor,
    sequences_T: Tensor,
    seen_T: Tensor,
    tiles: Tiles | None = None,
) -> Tensor:
    if not (INTERPRETED or q_THI.dtype == torch.bfloat16):
        return index_scores.reference(
            q_THI, gate_TH, keys, kind, per, table_SB, sequences_T, seen_T
        )
    tiles = tiles or Tiles()
    t, heads, dims = q_THI.shape
    e = table_SB.shape[1] * per
    out = torch.empty(t, e, dtype=torch.float32, device=q_THI.device)
    scores_kernel[(triton.cdiv(e, tiles.keys * tiles.run), t)](
        q_THI, gate_TH, keys, table_SB, sequences_T, seen_T, out, table_SB.shape[1], e, heads,
        STRIDE=keys.stride(0), H=max(16, triton.next_power_of_2(heads)), DIM=dims, PER=per,
        KIND=kind, DATA=SIZES.get(kind, (dims, 0))[0], BN=tiles.keys, RUN=tiles.run,
        STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out
