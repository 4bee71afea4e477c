"""Attention of all rows of a pass, decoding rows and chunks alike, over keys where they lie.

Row t at position p belongs to a sequence whose new rows begin at `first_T[t]` with position
`start_T[t]`. Its raw keys are those of the last W positions: of new rows from `new_TD`, of older
ones from the sequence's ring. The order of its sums is that of `sink_attention`: the ring by slot,
then its entries as listed.

Legend: T rows, H heads, D head_dim, N slots, W window, F pool rows, P rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel
from whalepod.kernels.rope import rotate_
from whalepod.kernels.sink_attention import sink_attention


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of a pass belong: `[T]` int64 each."""

    slot_T: Tensor
    start_T: Tensor
    first_T: Tensor
    position_T: Tensor


@dataclass(frozen=True, slots=True)
class Listed:
    """Entries of every row: `count_T[t]` pool rows from `rows[offset_T[t]]` on, all int64."""

    rows: Tensor
    offset_T: Tensor
    count_T: Tensor
    most: int


@Kernel
def attend(
    q_THD: Tensor,
    new_TD: Tensor,
    ring_NWD: Tensor,
    rows: Rows,
    entries_FD: Tensor | None,
    listed: Listed | None,
    sink_H: Tensor,
    turns_TP: Tensor,
) -> Tensor:
    """Attend, and turn the result back by the row's position.

    Args:
        q_THD, new_TD: queries, and the new rows' keys (which are their values).
        ring_NWD: rings of all slots as they were before the pass, by position modulo W.
        entries_FD, listed: compressed entries of all sequences, and which ones a row sees.
        sink_H: `[H]` fp32 logit per head, not scaled.
        turns_TP: `[T, P]` complex64.

    Returns:
        `[T, H, D]` in the dtype of `q_THD`.
    """
    window, at = ring_NWD.shape[1], rows.position_T.unsqueeze(-1)
    slots_W = torch.arange(window, device=at.device)
    back_TW = (at - slots_W) % window  # how far behind the row the key of each slot is
    keys_TWD = ring_NWD[rows.slot_T]
    fresh_TW = at - back_TW >= rows.start_T.unsqueeze(-1)
    source_TW = (rows.first_T.unsqueeze(-1) + at - back_TW - rows.start_T.unsqueeze(-1)).clamp(
        0, max(0, new_TD.shape[0] - 1)
    )
    keys_TWD = torch.where(fresh_TW.unsqueeze(-1), new_TD[source_TW].to(keys_TWD.dtype), keys_TWD)
    found = None
    if entries_FD is not None and listed is not None and listed.most:
        order_K = torch.arange(listed.most, device=at.device)
        seen_TK = order_K < listed.count_T.unsqueeze(-1)
        place_TK = (listed.offset_T.unsqueeze(-1) + order_K).clamp(max=len(listed.rows) - 1)
        found = F.embedding(listed.rows[place_TK], entries_FD), seen_TK.unsqueeze(1)
    out = sink_attention(
        q_THD.unsqueeze(1), (keys_TWD, keys_TWD), at % window, at // window, found, sink_H
    )
    return rotate_(out.squeeze(1), turns_TP, inverse=True)


@Kernel
def keep_rows(ring_NWD: Tensor, new_TD: Tensor, rows: Rows, count: int) -> None:
    """Write the first `count` new rows into their rings, by position modulo W."""
    few = slice(0, count)
    at = rows.position_T[few] % ring_NWD.shape[1]
    ring_NWD[rows.slot_T[few], at] = new_TD[few].to(ring_NWD.dtype)


@Kernel
def write_ring(rings: Tensor, slot: int, start: int, values: Tensor) -> None:
    """Write `values`, one row a position from `start` on, into the ring of a slot.

    Args:
        rings: `[N, R, ...]`, addressed by position modulo R; at most R values are written.
    """
    size = rings.shape[1]
    at = torch.arange(start, start + len(values), device=rings.device) % size
    rings[slot, at] = values.to(rings.dtype)
