"""Pool every `ratio` tokens into one entry by a gated softmax, per channel.

Ratio 4 overlaps: a token's first half of channels feeds the next window's entry, its second half
its own window's, so an entry pools 8 slots. Any other ratio pools its own window only.

Legend: T tokens, X windows, J slots of a window, D entry width, coff 2 with overlap else 1.
Source: DeepSeek-V4 inference/model.py, Compressor. All of it is fp32 until the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from whalepod.kernels.pool import pool_entries, pooled
from whalepod.kernels.rms_norm import rms_norm
from whalepod.model.batch import Batch, Span
from whalepod.model.cache import Compressed
from whalepod.model.rope import rotate_, turns
from whalepod.model.shape import ModelConfig


class Compressor:
    """One compressor (`attn.compressor` or `attn.indexer.compressor`) of one layer.

    The projections are done by the caller, together with others of the same input: rows
    `weight` give c and s side by side, `[T, 2 * coff * D]`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dim: int,
        weights: Mapping[str, Tensor],
        prefix: str,
        freqs: Tensor,
        dtype: torch.dtype,
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self.ratio, self.overlap, self.dim = config.ratio(layer), config.ratio(layer) == 4, dim
        self.coff = 2 if self.overlap else 1
        self.eps, self.freqs, self.dtype = config.rms_norm_eps, freqs, dtype
        self.finish = finish
        self.weight = torch.cat(
            [weights[f"{prefix}.wkv.weight"], weights[f"{prefix}.wgate.weight"]]
        )
        self.ape_JC = weights[f"{prefix}.ape"]
        self.norm_D = weights[f"{prefix}.norm.weight"]

    def update(self, projected: Tensor, batch: Batch, state: Compressed) -> None:
        """Take the pass's new rows in, and write the entry of every window they close.

        Args:
            projected: `[T, 2 * coff * D]` fp32, this compressor's projection of the block input.
            batch: the pass.
            state: this layer's pool and raw ring. Entries are written at once (a re-run writes
                the same values), raw rows of chunks at `batch.commit()`.
        """
        rows = projected.unflatten(-1, (2, self.coff * self.dim))
        if batch.decoding:
            self._decode(rows[: batch.decoding], batch, state)
        for span in batch.chunks:
            self._chunk(rows[span.rows], span, batch, state)

    def update_rows(self, projected: Tensor, batch: Batch, state: Compressed) -> None:
        """As `update`, for all rows in one operation; nothing is rounded."""
        rows = projected.unflatten(-1, (2, self.coff * self.dim))
        _, closed_T, some = batch.entries(self.ratio)
        turns_TP = batch.window_turns(self.freqs, self.ratio) if some else batch.turns(self.freqs)
        pool_entries(
            *(rows, self.ape_JC, state.raw, batch.layout.rows, batch.decoding, closed_T),
            *(self.norm_D, turns_TP, self.eps, state.entries),
        )
        for span in batch.chunks:
            positions = batch.positions_T[span.rows]
            batch.write_later(span.slot, state.raw, positions, rows[span.rows])

    def _decode(self, rows: Tensor, batch: Batch, state: Compressed) -> None:
        view, ring = batch.decode_view(self.ratio), state.raw.shape[1]
        rows[:, 1] += self.ape_JC[view.phase_D]
        # Slot t mod ring holds a row that no query from t on needs, so writing it now is safe.
        at = batch.positions_T[: batch.decoding] % ring
        state.raw[batch.slots_D, at] = rows
        if not len(view.closing):
            return
        last = at[view.closing].unsqueeze(-1)
        back = torch.arange(ring - 1, -1, -1, device=at.device)
        window = state.raw[batch.slots_D[view.closing].unsqueeze(-1), (last - back) % ring]
        first = (view.closing_positions == 0) if self.overlap else None
        state.entries[view.closing_rows] = self._entries(window, first, view.closing_positions)

    def _chunk(self, rows: Tensor, span: Span, batch: Batch, state: Compressed) -> None:
        ring, ratio, device = state.raw.shape[1], self.ratio, rows.device
        positions = batch.positions_T[span.rows]
        rows[:, 1] += self.ape_JC[positions % ratio]
        batch.write_later(span.slot, state.raw, positions, rows)
        first, stop = span.start // ratio, span.end // ratio
        if stop == first:
            return
        # Rows from the start of the window (with overlap: of the one before), old ones first.
        base = max(first - 1 if self.overlap else first, 0) * ratio
        old = torch.arange(base, span.start, device=device) % ring
        rows = torch.cat([state.raw[span.slot, old], rows])[: stop * ratio - base]
        windows = rows.unflatten(0, (-1, ratio))
        starts = None
        if self.overlap:
            before = torch.cat([windows[:1], windows]) if first == 0 else windows
            windows = torch.cat([before[:-1], before[1:]], dim=1)
            starts = torch.arange(first, stop, device=device) == 0
        at = torch.arange(first, stop, device=device) * ratio
        made = self._entries(windows, starts, at)
        state.entries[batch.entry_rows(span, ratio, first, stop)] = made

    def _entries(self, window: Tensor, starts: Tensor | None, positions: Tensor) -> Tensor:
        """Pool `[X, J, 2, coff*D]` into `[X, D]`; `starts` marks windows with no predecessor."""
        summed = pooled(window, starts, self.dim)
        entries = rms_norm(summed.to(self.dtype), self.norm_D, self.eps)
        return self.finish(rotate_(entries, turns(positions, self.freqs)))
