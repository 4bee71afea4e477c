"""Compress closed windows of tokens into entries, for all rows of a pass at once.

Legend: T rows, X windows, J slots of a window, D entry width, C its channels (2D with overlap, else
D), N slots, R ring rows, F pool rows, P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.attend import Rows
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rope import rotate_


def pooled(window: Tensor, starts: Tensor | None, dim: int) -> Tensor:
    """Pool `[X, J, 2, C]` into `[X, D]` by a softmax over J, per channel.

    Args:
        window: values and gate logits; with overlap the first half of J belongs to the window before.
        starts: with overlap, marks windows with no predecessor; else None.
    """
    if starts is not None:
        half = window.shape[1] // 2
        window = torch.cat([window[:, :half, :, :dim], window[:, half:, :, dim:]], dim=1)
    values, logits = window.unbind(2)
    if starts is not None:
        first_half = torch.arange(logits.shape[1], device=logits.device) < half
        absent = starts.view(-1, 1, 1) & first_half.view(1, -1, 1)
        logits = logits.masked_fill(absent, float("-inf"))
    return (torch.softmax(logits, dim=1) * values).sum(1)


@Kernel
def pool_entries(
    projected_T2C: Tensor,
    ape_JC: Tensor,
    raw_NR2C: Tensor,
    rows: Rows,
    decoding: int,
    closed_T: Tensor,
    norm_D: Tensor,
    turns_TP: Tensor,
    eps: float,
    entries_FD: Tensor,
) -> None:
    """Add the position bias to a pass's rows and write the entry of every window they close.

    Args:
        projected_T2C: values and gate logits; the bias is added to the logits in place.
        ape_JC: `[ratio, C]`, the bias by position modulo ratio.
        raw_NR2C: rows of open windows, by position modulo R; the first `decoding` rows are
            written there, after which no window that closes needs what they replace.
        closed_T: pool row of the entry that row t closes, or -1; int64.
        norm_D: weight of the entries' norm. turns_TP: at the first position of row t's window.
        entries_FD: written in place.
    """
    ratio, ring, dim = ape_JC.shape[0], raw_NR2C.shape[1], entries_FD.shape[1]
    projected_T2C[:, 1] += ape_JC[rows.position_T % ratio]
    closing = (closed_T >= 0).nonzero()[:, 0]
    if len(closing):
        back = torch.arange(ring - 1, -1, -1, device=closing.device)
        at = rows.position_T[closing].unsqueeze(-1) - back
        start, first = rows.start_T[closing].unsqueeze(-1), rows.first_T[closing].unsqueeze(-1)
        fresh = (at >= start).view(*at.shape, 1, 1)
        new = projected_T2C[(first + at - start).clamp(0, len(projected_T2C) - 1)]
        old = raw_NR2C[rows.slot_T[closing].unsqueeze(-1), at % ring]
        overlap = ring == 2 * ratio
        starts = at[:, 0] < 0 if overlap else None
        made = rms_norm(pooled(torch.where(fresh, new, old), starts, dim), norm_D, eps)
        entries_FD[closed_T[closing]] = rotate_(made, turns_TP[closing])
    few = slice(0, decoding)
    raw_NR2C[rows.slot_T[few], rows.position_T[few] % ring] = projected_T2C[few]
