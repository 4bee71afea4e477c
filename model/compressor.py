"""A layer's compressor: its weights, and where its rows and entries lie.

Legend: T tokens, D entry width, coff 2 with overlap else 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.compress import Pooling, compress_chunk, compress_decode
from whalepod.kernels.entries import Rounding
from whalepod.kernels.pool import pool_entries
from whalepod.model.batch import Batch, Span
from whalepod.model.cache import Compressed
from whalepod.model.rope import turns
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
        rounding: Rounding,
    ) -> None:
        self.ratio, self.freqs = config.ratio(layer), freqs
        self.weight = torch.cat(
            [weights[f"{prefix}.wkv.weight"], weights[f"{prefix}.wgate.weight"]]
        )
        self.how = Pooling(
            weights[f"{prefix}.ape"],
            weights[f"{prefix}.norm.weight"],
            self.ratio,
            config.rms_norm_eps,
            dtype,
            rounding,
        )

    def update(self, projected: Tensor, batch: Batch, state: Compressed) -> None:
        """Take the pass's new rows in, and write the entry of every window they close.

        Args:
            projected: `[T, 2 * coff * D]` fp32, this compressor's projection of the block input.
            batch: the pass.
            state: this layer's pool and raw ring. Entries are written at once (a re-run writes
                the same values), raw rows of chunks at `batch.commit()`.
        """
        rows = projected.unflatten(-1, (2, -1))
        if batch.decoding:
            # Slot t mod ring holds a row that no query from t on needs, so writing it now is safe.
            compress_decode(
                rows[: batch.decoding],
                self.how,
                state.raw,
                state.entries,
                batch.slots_D,
                batch.positions_T[: batch.decoding],
                batch.blocks_D,
                batch.block_tokens // self.ratio,
                batch.window_turns(self.freqs, self.ratio)[: batch.decoding],
            )
        for span in batch.chunks:
            self._chunk(rows[span.rows], span, batch, state)

    def update_rows(self, projected: Tensor, batch: Batch, state: Compressed) -> None:
        """As `update`, for all rows in one operation; nothing is rounded."""
        rows = projected.unflatten(-1, (2, -1))
        _, closed_T, some = batch.entries(self.ratio)
        turns_TP = batch.window_turns(self.freqs, self.ratio) if some else batch.turns(self.freqs)
        pool_entries(
            *(rows, self.how.ape_JC, state.raw, batch.layout.rows, batch.decoding, closed_T),
            *(self.how.norm_D, turns_TP, self.how.eps, state.stored),
        )
        for span in batch.chunks:
            positions = batch.positions_T[span.rows]
            batch.write_later(span.slot, state.raw, positions, rows[span.rows])

    def _chunk(self, rows: Tensor, span: Span, batch: Batch, state: Compressed) -> None:
        first, stop = span.start // self.ratio, span.end // self.ratio
        at = torch.arange(first, stop, device=rows.device) * self.ratio
        compress_chunk(
            rows,
            self.how,
            state.raw[span.slot],
            state.entries,
            span.start,
            batch.entry_rows(span, self.ratio, first, stop),
            turns(at, self.freqs),
        )
        batch.write_later(span.slot, state.raw, batch.positions_T[span.rows], rows)
