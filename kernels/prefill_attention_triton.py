"""Launch prefill attention's Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.decode_attention import Entries
from whalepod.kernels.decode_attention_triton import (
    TILES,
    Tiles,
    fits,
    head_block,
    kernels,
    scale_of,
    sources,
)
from whalepod.kernels.jit import runs, triton
from whalepod.kernels.prefill_attention import prefill_attention


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
    t, heads, d = q_THD.shape
    kinds, most = sources(entries, q_THD, rings)
    source, extra = kernels(q_THD.device, tiles)
    h = head_block(heads, source)
    w, rd = rings.shape[1], 2 * turns_TP.shape[1]
    parts = triton.cdiv(triton.cdiv(w, tiles.keys) + triton.cdiv(most, tiles.keys), tiles.split)
    items = t * triton.cdiv(heads, h)
    programs = items if parts == 1 else min(items, _processors(q_THD.device))
    size = 1 if parts == 1 else programs * h
    scratch = torch.empty(size, d, dtype=torch.float32, device=q_THD.device)
    out = torch.empty_like(q_THD)
    source.prefill_kernel[(programs,)](
        q=q_THD, new=new_TD, rings=rings, slots=slots_T, positions=positions_T, starts=starts_T,
        sequences=sequences_T, sink=sink_H, turns=torch.view_as_real(turns_TP).contiguous(),
        out=out, scratch=scratch, scale=scale_of(d), T=t, HEADS=heads, H=h, D=d, RD=rd, W=w,
        BN=tiles.keys, SPLIT=tiles.split, **extra, **kinds,
    )  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
