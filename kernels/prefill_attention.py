"""Attention of chunks: many queries of few sequences over ring, chunk and entries.

Legend: T queries, H heads, D head_dim, P rotated pairs, W ring slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whalepod.kernels.decode_attention import Entries, turn_back, widened
from whalepod.kernels.registry import Kernel
from whalepod.kernels.sink_attention import sink_attention
from whalepod.kernels.unpack import entry_bytes, unpack

# Queries whose keys are gathered at a time.
_AT_ONCE = 64


def every_ring(rings: Tensor, q: Tensor) -> Tensor:
    """All rings as rows like those of `q`."""
    if rings.dtype != torch.uint8:
        return rings
    slots = torch.arange(len(rings), device=rings.device).unsqueeze(-1)
    dims = q.shape[-1]
    return unpack(rings, dims, rings.shape[1] // entry_bytes(dims), slots, True).to(q.dtype)


@Kernel
def prefill_attention(
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
) -> Tensor:
    """Attend as `decode_attention` would row by row, with the chunks' own keys not yet in rings.

    Args:
        q_THD: `[T, H, D]`; the queries of a sequence stand together, in order of position.
        new_TD: `[T, D]` window keys of the same tokens, rounded as the rings keep them.
        rings: `[slots, W, D]`, or packed pages, as the tokens before the chunks left them.
        slots_T: `[T]` ring of each query's sequence.
        positions_T: `[T]`.
        starts_T: `[T]` position of the first token of the query's chunk.
        entries: as in `decode_attention`; a block table has a row a sequence.
        sequences_T: `[T]` which row of the block table is the query's.
        sink_H: `[H]` fp32.
        turns_TP: `[T, P]` complex64.

    Returns:
        `[T, H, D]`; bits of a query do not depend on how its prompt was cut.
    """
    rings = every_ring(rings, q_THD)
    width = rings.shape[1]
    inside = torch.arange(width, device=rings.device)
    out = torch.empty_like(q_THD)
    for first in range(0, len(q_THD), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        at = positions_T[part].unsqueeze(-1)
        age = (at - inside) % width
        fresh = age <= at - starts_T[part].unsqueeze(-1)
        row = torch.arange(first, first + len(at), device=rings.device).unsqueeze(-1)
        ring = rings[slots_T[part].unsqueeze(-1), inside]
        ring = torch.where(fresh.unsqueeze(-1), new_TD[(row - age).clamp(min=0)], ring)
        ring = ring.masked_fill((age > at).unsqueeze(-1), 0).to(q_THD.dtype)
        listed = None
        if entries is not None and entries.most:
            rows = None if entries.rows_NK is None else entries.rows_NK[part]
            some = replace(entries, seen_N=entries.seen_N[part], rows_NK=rows)
            some = widened(some, q_THD) or some
            values, seen = some.gathered(sequences_T[part])
            listed = values.to(q_THD.dtype), seen.unsqueeze(1)
        out[part] = sink_attention.reference(
            q_THD[part].unsqueeze(1), (ring, ring), at % width, at // width, listed, sink_H
        ).squeeze(1)
    return turn_back(out, turns_TP)


from whalepod.kernels import prefill_attention_triton  # noqa: E402, F401  (registers its twin)
