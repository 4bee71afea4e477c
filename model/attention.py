"""Compressed sparse attention (CSA), heavily compressed attention (HCA) and plain window attention.

Legend: T tokens, D decoding rows, M queries of a chunk, H heads, S entries attended to, W window.
Source: DeepSeek-V4 inference/model.py, Attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.attend import attend, keep_rows
from whalepod.kernels.entries import Rounding
from whalepod.kernels.index_scores import read_keys
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.select import select
from whalepod.kernels.sink_attention import sink_attention
from whalepod.kernels.unpack import read_entries
from whalepod.kernels.window import window_rows
from whalepod.model.batch import Batch, Span
from whalepod.model.cache import LayerCache
from whalepod.model.compressor import Compressor
from whalepod.model.fidelity import Fidelity
from whalepod.model.indexer import Indexer
from whalepod.model.rope import rotate_
from whalepod.model.shape import ModelConfig

# Queries of a chunk that choose their own entries are taken so many entries at a time.
_GATHERED = 8192


class Attention:
    """One layer's attention; its kind follows from the layer's ratio."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Mapping[str, Tensor],
        prefix: str,
        freqs: Tensor,
        dtype: torch.dtype,
        fidelity: Fidelity,
    ) -> None:
        self.config, self.freqs, self.fidelity, self.dtype = config, freqs, fidelity, dtype
        self.ratio, self.kind = config.ratio(layer), config.kind(layer)
        self.rounding: Rounding = "kv" if fidelity.released else "none"
        w = {n.removeprefix(f"{prefix}."): t for n, t in weights.items() if n.startswith(prefix)}
        self.q_norm, self.kv_norm, self.sink_H = (
            w["q_norm.weight"],
            w["kv_norm.weight"],
            w["attn_sink"],
        )
        self.wo_a = w["wo_a.weight"].unflatten(0, (config.o_groups, config.o_lora_rank))
        self.wo_b = w["wo_b.weight"]
        # Matrices with the same input are one product.
        self.w_down = torch.cat([w["wq_a.weight"], w["wkv.weight"]])
        self.indexer: Indexer | None = None
        self.compressor: Compressor | None = None
        self.w_up, raw = w["wq_b.weight"], []
        if self.kind != "swa":
            self.compressor = Compressor(
                config, layer, config.head_dim, w, "compressor", freqs, dtype, self.rounding
            )
            raw.append(self.compressor.weight)
        if self.kind == "csa":
            self.indexer = Indexer(config, layer, w, "indexer", freqs, dtype, fidelity)
            self.w_up = torch.cat([self.w_up, self.indexer.wq_b])
            raw += [self.indexer.compressor.weight, self.indexer.weights_proj]
        self.wq_b, width = w["wq_b.weight"], w["wq_b.weight"].shape[0]
        if self.indexer is not None:
            self.wq_b, self.w_index = self.w_up[:width], self.w_up[width:]
        # One operation over all rows, where nothing is rounded on the way.
        self.exact = dtype == torch.float32 and not fidelity.released
        # These take the unrounded input and stay in fp32.
        self.w_raw = torch.cat(raw) if raw else None
        self.raw_sizes = [part.shape[0] for part in raw]

    def __call__(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend and project.

        Args:
            x_TD: `[T, hidden]`, after `attn_norm`.
            batch: the pass; its rows' state is read from and written to `cache`.

        Returns:
            `[T, hidden]`.
        """
        config, fidelity = self.config, self.fidelity
        low, kv = linear(fidelity.linear_input(x_TD), self.w_down).split(
            [config.q_lora_rank, config.head_dim], dim=-1
        )
        low = fidelity.linear_input(rms_norm(low, self.q_norm, config.rms_norm_eps))
        turns = batch.turns(self.freqs)
        if self.exact and cache.plain and attend.has_twin(x_TD.device.type):
            return self._project(self._rowwise(x_TD, low, kv, turns, batch, cache))
        kv = window_rows(kv, self.kv_norm, turns, config.rms_norm_eps, self.rounding)
        up = linear(low, self.w_up)
        width = config.num_attention_heads * config.head_dim
        q = up[:, :width].unflatten(-1, (config.num_attention_heads, config.head_dim))
        q = norm_rotate(q, None, turns, config.rms_norm_eps)
        picked = self._compress(x_TD, up[:, width:], batch, cache)
        out = torch.empty_like(q)
        if batch.decoding:
            out[: batch.decoding] = self._decode(q, kv, picked, batch, cache)
        for span in batch.chunks:
            out[span.rows] = self._chunk(q, kv, picked, span, batch, cache)
        return self._project(rotate_(out, turns, inverse=True))

    def _project(self, out: Tensor) -> Tensor:
        """Heads `[T, H, D]` back to the hidden width."""
        config, fidelity = self.config, self.fidelity
        grouped = grouped_linear(out.flatten(1).unflatten(1, (config.o_groups, -1)), self.wo_a)
        return linear(fidelity.linear_input(grouped), self.wo_b)

    def _rowwise(
        self,
        x_TD: Tensor,
        low: Tensor,
        kv: Tensor,
        turns: Tensor,
        batch: Batch,
        cache: LayerCache,
    ) -> Tensor:
        """Attend with decoding rows and chunks in the same operations, `[T, H, D]`."""
        config, eps, rows = self.config, self.config.rms_norm_eps, batch.layout.rows
        kv = norm_rotate(kv.unsqueeze(1), self.kv_norm, turns, eps).squeeze(1)
        heads = (config.num_attention_heads, config.head_dim)
        q = norm_rotate(linear(low, self.wq_b).unflatten(-1, heads), None, turns, eps)
        entries, listed = None, None
        if self.compressor is not None and cache.main is not None and self.w_raw is not None:
            parts = linear(x_TD, self.w_raw).split(self.raw_sizes, dim=-1)
            self.compressor.update_rows(parts[0], batch, cache.main)
            entries, listed = cache.main.stored, batch.entries(self.ratio)[0]
            if self.indexer is not None and cache.index is not None:
                self.indexer.compressor.update_rows(parts[1], batch, cache.index)
                if listed.most > self.indexer.topk:
                    raw = linear(low, self.w_index)
                    listed = self.indexer.pick(raw, parts[2], turns, cache.index.stored, listed)
        out = attend(q, kv, cache.window, rows, entries, listed, self.sink_H, turns)
        keep_rows(cache.window, kv, rows, batch.decoding)
        for span in batch.chunks:
            batch.write_later(span.slot, cache.window, batch.positions_T[span.rows], kv[span.rows])
        return out

    def _compress(
        self, x_TD: Tensor, up: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor] | None:
        """Update both compressors; return the indexer's queries and head weights (CSA)."""
        if self.w_raw is None:
            return None
        parts = linear(x_TD.float(), self.w_raw).split(self.raw_sizes, dim=-1)
        assert self.compressor is not None
        assert cache.main is not None
        # The entry a token closes is visible to that token, so compression comes first.
        self.compressor.update(parts[0], batch, cache.main)
        if self.indexer is None:
            return None
        assert cache.index is not None
        self.indexer.compressor.update(parts[1], batch, cache.index)
        return self.indexer.query(up, batch), parts[2]

    def _decode(
        self,
        q_THD: Tensor,
        kv_TD: Tensor,
        picked: tuple[Tensor, Tensor] | None,
        batch: Batch,
        cache: LayerCache,
    ) -> Tensor:
        n, window = batch.decoding, self.config.sliding_window
        positions = batch.positions_T[:n].unsqueeze(-1)
        # Position t replaces t - W, which no query from t on sees.
        cache.window[batch.slots_D, positions[:, 0] % window] = kv_TD[:n].to(cache.window.dtype)
        ring = cache.window.index_select(0, batch.slots_D)
        entries = None
        if cache.main is not None:
            if self.indexer is not None and picked is not None and cache.index is not None:
                rows, real = self.indexer.pick_decode(*picked, batch, cache.index, self.ratio)
            else:
                view = batch.decode_view(self.ratio)
                rows, real = view.entries_DE, view.seen_DE
            entries = self._read(rows, cache), real.unsqueeze(1)
        q = q_THD[:n].unsqueeze(1)
        at = positions % window, positions // window
        return sink_attention(q, (ring, ring), *at, entries, self.sink_H).squeeze(1)

    def _chunk(
        self,
        q_THD: Tensor,
        kv_TD: Tensor,
        picked: tuple[Tensor, Tensor] | None,
        span: Span,
        batch: Batch,
        cache: LayerCache,
    ) -> Tensor:
        """Attend lap by lap: the queries of one lap of the ring share its keys."""
        window = self.config.sliding_window
        q, new = q_THD[span.rows], kv_TD[span.rows].to(cache.window.dtype)
        positions = batch.positions_T[span.rows]
        batch.write_later(span.slot, cache.window, positions, new)
        out = torch.empty_like(q)
        before = cache.window[span.slot]
        for lap in range(span.start // window, (span.end - 1) // window + 1):
            first, stop = max(lap * window, span.start), min((lap + 1) * window, span.end)
            ring = before.clone()
            part = slice(first - span.start, stop - span.start)
            ring[first % window : first % window + stop - first] = new[part]
            for few in self._portions(part):
                at = positions[few].unsqueeze(0)
                entries = self._entries(picked, span, few, batch, cache)
                out[few] = sink_attention(
                    q[few].unsqueeze(0),
                    (ring.unsqueeze(0), before.unsqueeze(0)),
                    at % window,
                    at // window,
                    entries,
                    self.sink_H,
                )
            before = ring
        return out

    def _read(self, rows: Tensor, cache: LayerCache) -> Tensor:
        """Entries of flat pool rows, in the compute type."""
        assert cache.main is not None
        return read_entries(cache.main.entries, rows, self.config.head_dim).to(self.dtype)

    def _portions(self, rows: slice) -> list[slice]:
        """Cut rows so that what their own entries occupy stays within bounds."""
        if self.indexer is None:
            return [rows]
        count = max(1, _GATHERED // self.indexer.topk)
        starts = range(rows.start, rows.stop, count)
        return [slice(first, min(first + count, rows.stop)) for first in starts]

    def _entries(
        self,
        picked: tuple[Tensor, Tensor] | None,
        span: Span,
        rows: slice,
        batch: Batch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor] | None:
        """Entries for some queries of a chunk: all that the last one sees, or each one's choice."""
        count = (span.start + rows.stop) // self.ratio if self.ratio else 0
        if not count:
            return None
        assert cache.main is not None
        pool = batch.table(span, self.ratio)[:count]
        positions = batch.positions_T[span.rows][rows].unsqueeze(-1)
        visible = torch.arange(count, device=pool.device) < (positions + 1) // self.ratio
        if self.indexer is None or count <= self.indexer.topk:
            return self._read(pool, cache).unsqueeze(0), visible.unsqueeze(0)
        assert picked is not None
        assert cache.index is not None
        at = slice(span.row + rows.start, span.row + rows.stop)
        scores = self.indexer.score(
            picked[0][at].unsqueeze(0),
            picked[1][at].unsqueeze(0),
            read_keys(cache.index.entries, pool).to(self.dtype).unsqueeze(0),
        ).squeeze(0)
        best = select(scores.masked_fill_(~visible, float("-inf")), self.indexer.topk)
        chosen = self._read(pool[best], cache)
        return chosen.unsqueeze(0), visible.gather(1, best).unsqueeze(0)
