"""Attention of decoding rows: one query a sequence, its ring and its entries, in place.

Legend: N rows, H heads, D head_dim, P rotated pairs, W ring slots, K listed entries, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whalepod.kernels.registry import Kernel
from whalepod.kernels.sink_attention import sink_attention
from whalepod.kernels.unpack import entry_bytes, unpack


@dataclass(frozen=True, slots=True)
class Entries:
    """Compressed entries of a layer and where each query's lie; nothing here depends on the host.

    Args:
        pool: `[F, D]`, fp32 or bf16 rows, or packed pages `[pages, stride]` uint8 (`unpack`).
        seen_N: `[N]` int32 or int64: how many entries each query attends to, the first so many.
        rows_NK: `[N, K]` flat pool rows, in order; a query sees at most K. Or
        table_SB: `[S, B]` block table: entry e lies in row `table[e // per] * per + e % per`.
        per: entries of a block.
    """

    pool: Tensor
    seen_N: Tensor
    rows_NK: Tensor | None = None
    table_SB: Tensor | None = None
    per: int = 1

    @property
    def most(self) -> int:
        """Bound on the entries of a query."""
        if self.rows_NK is not None:
            return self.rows_NK.shape[1]
        assert self.table_SB is not None
        return self.table_SB.shape[1] * self.per

    def gathered(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of each query `[N, K, D]`, given its row of the table, and which it sees."""
        rows = self.rows_NK
        if rows is None:
            assert self.table_SB is not None
            inside = torch.arange(self.per, device=self.pool.device)
            rows = self.table_SB[sequences].long().unsqueeze(-1) * self.per + inside
            rows = rows.flatten(1)
        real = torch.arange(rows.shape[1], device=rows.device) < self.seen_N.unsqueeze(-1)
        values = self.pool[rows.masked_fill(~real, 0)]
        # What lies in unused rows may be anything.
        return values.masked_fill(~real.unsqueeze(-1), 0), real


def widened_rings(rings: Tensor, slots_N: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Rings as rows like those of `q`, and the queries' slots in them; packed ones are one page a slot."""
    if rings.dtype != torch.uint8:
        return rings, slots_N
    dims = q.shape[-1]
    window = rings.shape[1] // entry_bytes(dims)
    own = torch.arange(len(slots_N), device=rings.device)
    return unpack(rings, dims, window, slots_N.unsqueeze(-1), True).to(q.dtype), own


def widened(entries: Entries | None, q: Tensor) -> Entries | None:
    """Entries of decoding rows, or of chunks that share them, in a pool of rows like those of `q`."""
    if entries is None or entries.pool.dtype != torch.uint8:
        return entries
    pool, device, dims = entries.pool, entries.pool.device, q.shape[-1]
    if entries.rows_NK is not None:
        rows = unpack(pool, dims, entries.per, entries.rows_NK, False, entries.seen_N)
        order = torch.arange(entries.rows_NK.numel(), device=device).view_as(entries.rows_NK)
        return replace(entries, pool=rows.flatten(0, 1).to(q.dtype), rows_NK=order)
    assert entries.table_SB is not None
    table = entries.table_SB
    each = entries.seen_N if len(table) == len(entries.seen_N) else None
    rows = unpack(pool, dims, entries.per, table, True, each)
    order = torch.arange(table.numel(), dtype=torch.int32, device=device).view_as(table)
    return replace(entries, pool=rows.flatten(0, 1).to(q.dtype), table_SB=order)


def turn_back(x_NHD: Tensor, turns_NP: Tensor) -> Tensor:
    """Rotate the last 2 P dims by the negative angle; turns are unit complex numbers."""
    at = x_NHD.shape[-1] - 2 * turns_NP.shape[-1]
    pairs = x_NHD[..., at:].unflatten(-1, (-1, 2)).float().contiguous()
    turned = torch.view_as_complex(pairs) * turns_NP.conj().unsqueeze(1)
    tail = torch.view_as_real(turned).flatten(-2).to(x_NHD.dtype)
    return torch.cat([x_NHD[..., :at], tail], dim=-1)


@Kernel
def decode_attention(
    q_NHD: Tensor,
    rings: Tensor,
    slots_N: Tensor,
    positions_N: Tensor,
    entries: Entries | None,
    sink_H: Tensor,
    turns_NP: Tensor,
) -> Tensor:
    """Attend and turn the result back: `o = sum p_s kv_s` over the sink, the ring, the entries.

    Args:
        q_NHD: `[N, H, D]`.
        rings: `[slots, W, D]`, or packed pages `[slots, stride]` of W entries, with each row's
            own key already in it, addressed by position modulo W; slots that its sequence has not
            filled are not read.
        slots_N: `[N]` ring of each row.
        positions_N: `[N]` position of each row.
        entries: None for a layer without.
        sink_H: `[H]` fp32 logit per head, not scaled.
        turns_NP: `[N, P]` complex64, rotations of the positions.

    Returns:
        `[N, H, D]` in the dtype of `q_NHD`; a row's bits do not depend on the other rows.
    """
    rings, slots_N = widened_rings(rings, slots_N, q_NHD)
    entries = widened(entries, q_NHD)
    width = rings.shape[1]
    at = positions_N.unsqueeze(-1)
    real = torch.arange(width, device=rings.device) <= at
    ring = rings[slots_N].masked_fill(~real.unsqueeze(-1), 0).to(q_NHD.dtype)
    listed = None
    if entries is not None and entries.most:
        own = torch.arange(len(q_NHD), device=q_NHD.device)
        values, seen = entries.gathered(own)
        listed = values.to(q_NHD.dtype), seen.unsqueeze(1)
    out = sink_attention.reference(
        q_NHD.unsqueeze(1), (ring, ring), at % width, at // width, listed, sink_H
    )
    return turn_back(out.squeeze(1), turns_NP)


from whalepod.kernels import decode_attention_triton  # noqa: E402, F401  (registers its twin)
