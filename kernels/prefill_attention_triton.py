"""Launch prefill attention's Triton kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whalepod.kernels.decode_attention import Entries, widened
from whalepod.kernels.decode_attention_triton import (
    TILES,
    Tiles,
    fits,
    head_block,
    kernels,
    processors,
    scale_of,
    sources,
)
from whalepod.kernels.jit import runs, triton
from whalepod.kernels.overlap import early
from whalepod.kernels.prefill_attention import every_ring, prefill_attention

# 64 MiB of rows where each chose 512.
_AT_ONCE = 128


@prefill_attention.twin("triton", runs)
def _prefill(
    q_THD: Tensor,
    new_TD: Tensor,
    rings: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    starts_T: Tensor,
    entries: Entries | None,
    sequences_T: Tensor,
    sink_H: Tensor,
    turns_TP: Tensor,
    tiles: Tiles = TILES,
) -> Tensor:
    if not fits(q_THD):
        return prefill_attention.reference(
            q_THD, new_TD, rings, slots_T, positions_T, starts_T, entries, sequences_T, sink_H,
            turns_TP,
        )  # fmt: skip
    rings = every_ring(rings, q_THD)
    out = torch.empty_like(q_THD)
    # Packed entries that each query chose for itself are widened for so many at a time.
    packed = entries is not None and entries.pool.dtype == torch.uint8
    count = _AT_ONCE if packed and entries and entries.rows_NK is not None else len(q_THD)
    for first in range(0, len(q_THD), max(1, count)):
        some = widened(_part(entries, first, count), q_THD)
        _launch(
            q_THD, new_TD, rings, slots_T, positions_T, starts_T, some, sequences_T, sink_H,
            turns_TP, tiles, out, first, min(count, len(q_THD) - first),
        )  # fmt: skip
    return out


def _part(entries: Entries | None, first: int, count: int) -> Entries | None:
    if entries is None or (first == 0 and count >= len(entries.seen_N)):
        return entries
    part = slice(first, first + count)
    rows = None if entries.rows_NK is None else entries.rows_NK[part]
    return replace(entries, seen_N=entries.seen_N[part], rows_NK=rows)


def _launch(
    q_THD: Tensor,
    new_TD: Tensor,
    rings: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    starts_T: Tensor,
    entries: Entries | None,
    sequences_T: Tensor,
    sink_H: Tensor,
    turns_TP: Tensor,
    tiles: Tiles,
    out: Tensor,
    first: int,
    count: int,
) -> None:
    _, heads, d = q_THD.shape
    part = slice(first, first + count)
    kinds, most = sources(entries, q_THD, rings)
    source, extra = kernels(q_THD.device, tiles)
    h = head_block(heads, source)
    w, rd = rings.shape[1], 2 * turns_TP.shape[1]
    parts = triton.cdiv(triton.cdiv(w, tiles.keys) + triton.cdiv(most, tiles.keys), tiles.split)
    items = count * triton.cdiv(heads, h)
    programs = items if parts == 1 else min(items, processors(q_THD.device))
    size = 1 if parts == 1 else programs * h
    scratch = torch.empty(size, d, dtype=torch.float32, device=q_THD.device)
    turns = torch.view_as_real(turns_TP[part]).contiguous()
    # A query's predecessors lie before it in `new`, so that one is not cut.
    source.prefill_kernel[(programs,)](
        q=q_THD[part], new=new_TD, rings=rings, slots=slots_T[part], positions=positions_T[part],
        starts=starts_T[part], sequences=sequences_T[part], sink=sink_H, turns=turns,
        out=out[part], scratch=scratch, scale=scale_of(d), T=count, FIRST=first, HEADS=heads, H=h,
        D=d, RD=rd, W=w, BN=tiles.keys, SPLIT=tiles.split, NEW=True, **extra, **kinds, **early(),
    )  # fmt: skip
