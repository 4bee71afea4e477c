"""Pool every `ratio` tokens into one cache entry by a gated softmax, per channel.

Ratio 4 overlaps: a token's first half of channels feeds the next window's entry, its second half
its own window's, so an entry pools 8 slots. Any other ratio pools its own window only.

Legend: T tokens, N decoding rows, X entries, J slots of a window, D entry width, C = coff * D
channels (coff 2 with overlap, else 1), R rows of a ring, P rotated pairs.
Source: DeepSeek-V4 inference/model.py, Compressor. All of it is fp32 until the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.kernels.entries import Rounding, Storage, put
from whalepod.kernels.jit import runs
from whalepod.kernels.pool import pooled
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rope import rotate_


@dataclass(frozen=True, slots=True)
class Pooling:
    """What one compressor does with its windows.

    Args:
        ape_JC: `[ratio, C]` fp32, added to the gate logits by place in the window.
        norm_D: `[D]` fp32.
        ratio: tokens of a window; 4 overlaps.
        eps: of the norm.
        dtype: entries are rounded to it before the norm, after it and after the rotation.
        rounding: how entries are rounded then (`round_entries`).
    """

    ape_JC: Tensor
    norm_D: Tensor
    ratio: int
    eps: float
    dtype: torch.dtype
    rounding: Rounding

    @property
    def overlap(self) -> bool:
        """Whether a window also pools the one before it."""
        return self.ratio == 4

    @property
    def slots(self) -> int:
        """J, which is also the least R."""
        return 2 * self.ratio if self.overlap else self.ratio


@Kernel
def compress_decode(
    rows_N2C: Tensor,
    how: Pooling,
    raw_SR2C: Tensor,
    entries: Storage,
    slots_N: Tensor,
    positions_N: Tensor,
    blocks_N: Tensor,
    per_block: int,
    turns_NP: Tensor,
) -> None:
    """Take one token of each sequence in; write the entry of every window that closes with it.

    Args:
        rows_N2C: `[N, 2, C]` fp32, projections c and s (gate logits).
        how: the compressor.
        raw_SR2C: `[slots, R, 2, C]` fp32 rings of rows, addressed by position modulo R; the new row is
            written with its position bias.
        entries: entry w of sequence n goes into flat row `blocks_N[n] * per_block + w % per_block`.
        slots_N, positions_N: `[N]` int64; no slot appears twice.
        blocks_N: `[N]` int64, the block of the pool that each row's position belongs to.
        per_block: entries of a block.
        turns_NP: `[N, P]` complex64, rotations of the first position of each row's window.
    """
    ratio, size = how.ratio, raw_SR2C.shape[1]
    biased = rows_N2C[:, 1] + how.ape_JC[positions_N % ratio]
    at = positions_N % size
    raw_SR2C[slots_N, at] = torch.stack([rows_N2C[:, 0], biased], 1)
    closing = ((positions_N + 1) % ratio == 0).nonzero().squeeze(1)
    if not len(closing):
        return
    back = torch.arange(how.slots - 1, -1, -1, device=at.device)
    window = raw_SR2C[slots_N[closing].unsqueeze(-1), (at[closing].unsqueeze(-1) - back) % size]
    number = positions_N[closing] // ratio
    rows = blocks_N[closing] * per_block + number % per_block
    _write(window, number == 0, turns_NP[closing], how, entries, rows)


@Kernel
def compress_chunk(
    rows_T2C: Tensor,
    how: Pooling,
    raw_R2C: Tensor,
    entries: Storage,
    start: int,
    flat_X: Tensor,
    turns_XP: Tensor,
) -> None:
    """Take several tokens of one sequence in, and write the entries of the windows they close.

    Args:
        rows_T2C: `[T, 2, C]` fp32; the position bias is added to the gate logits in place. The ring is
            not written: the caller does, when the rows are known to stay.
        how: the compressor.
        raw_R2C: the sequence's ring, with the rows before `start`.
        entries: storage. start: position of the first token.
        flat_X: `[X]` int64, flat rows of the entries of windows `start // ratio` to
            `(start + T) // ratio - 1`.
        turns_XP: `[X, P]` complex64, rotations of the windows' first positions.
    """
    ratio, size, end = how.ratio, raw_R2C.shape[0], start + len(rows_T2C)
    positions = torch.arange(start, end, device=rows_T2C.device)
    rows_T2C[:, 1] += how.ape_JC[positions % ratio]
    first, stop = start // ratio, end // ratio
    if stop == first:
        return
    # Rows from the start of the window (with overlap: of the one before), old ones first.
    base = max(first - 1 if how.overlap else first, 0) * ratio
    old = torch.arange(base, start, device=rows_T2C.device) % size
    rows = torch.cat([raw_R2C[old], rows_T2C])[: stop * ratio - base]
    windows = rows.unflatten(0, (-1, ratio))
    if how.overlap:
        before = torch.cat([windows[:1], windows]) if first == 0 else windows
        windows = torch.cat([before[:-1], before[1:]], dim=1)
    starts = torch.arange(first, stop, device=rows_T2C.device) == 0
    _write(windows, starts, turns_XP, how, entries, flat_X)


def _write(
    window: Tensor, starts: Tensor, turns: Tensor, how: Pooling, entries: Storage, rows: Tensor
) -> None:
    """Pool `[X, J, 2, C]` and write; `starts` marks windows with no predecessor."""
    summed = pooled(window, starts if how.overlap else None, how.norm_D.shape[0])
    made = rotate_(rms_norm.reference(summed.to(how.dtype), how.norm_D, how.eps), turns)
    put(entries, rows, made, how.rounding, 2 * turns.shape[1])


from whalepod.kernels import compress_triton as _twins  # noqa: E402

compress_decode.twin("triton", runs)(_twins.decode)
compress_chunk.twin("triton", runs)(_twins.chunk)
