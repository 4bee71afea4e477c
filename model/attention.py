"""Compressed sparse attention (CSA), heavily compressed attention (HCA) and plain window attention.

Legend: T tokens, D decoding rows, M queries of a chunk, H heads, S entries attended to, W window.
Source: DeepSeek-V4 inference/model.py, Attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.select import select
from whalepod.kernels.sink_attention import sink_attention
from whalepod.model.batch import Batch, Span
from whalepod.model.cache import LayerCache
from whalepod.model.compressor import Compressor
from whalepod.model.fidelity import Fidelity
from whalepod.model.indexer import Indexer
from whalepod.model.rope import rotate_
from whalepod.model.shape import ModelConfig

# A chunk's queries attend densely, under a mask, while that reads at most this many times what
# each query selects; beyond it every query gathers its own entries, this many queries at a time.
_DENSE_LIMIT, _GATHER_QUERIES = 4, 32


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
                config, layer, config.head_dim, w, "compressor", freqs, dtype, self._round_kv
            )
            raw.append(self.compressor.weight)
        if self.kind == "csa":
            self.indexer = Indexer(config, layer, w, "indexer", freqs, dtype, fidelity)
            self.w_up = torch.cat([self.w_up, self.indexer.wq_b])
            raw += [self.indexer.compressor.weight, self.indexer.weights_proj]
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
        kv = self._round_kv(rotate_(rms_norm(kv, self.kv_norm, config.rms_norm_eps), turns))
        up = linear(low, self.w_up)
        width = config.num_attention_heads * config.head_dim
        q = up[:, :width].unflatten(-1, (config.num_attention_heads, config.head_dim))
        q = rotate_(rms_norm(q, None, config.rms_norm_eps), turns)
        picked = self._compress(x_TD, up[:, width:], batch, cache)
        out = torch.empty_like(q)
        if batch.decoding:
            out[: batch.decoding] = self._decode(q, kv, picked, batch, cache)
        for span in batch.chunks:
            out[span.rows] = self._chunk(q, kv, picked, span, batch, cache)
        rotate_(out, turns, inverse=True)
        grouped = grouped_linear(out.flatten(1).unflatten(1, (config.o_groups, -1)), self.wo_a)
        return linear(fidelity.linear_input(grouped), self.wo_b)

    def _round_kv(self, x: Tensor) -> Tensor:
        return self.fidelity.kv(x, self.config.qk_rope_head_dim)

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
        positions = batch.positions_T[:n]
        # Position t replaces t - W, which no query from t on sees.
        cache.window[batch.slots_D, positions % window] = kv_TD[:n].to(cache.window.dtype)
        kv = cache.window[batch.slots_D]
        slots = torch.arange(window, device=positions.device)
        seen = slots <= positions.unsqueeze(-1)
        if cache.main is not None:
            if self.indexer is not None and picked is not None and cache.index is not None:
                rows, real = self.indexer.pick_decode(*picked, batch, cache.index, self.ratio)
            else:
                view = batch.decode_view(self.ratio)
                rows, real = view.entries_DE, view.seen_DE
            kv = torch.cat([kv, cache.main.entries[rows]], dim=1)
            seen = torch.cat([seen, real], dim=1)
        return sink_attention(q_THD[:n].unsqueeze(1), kv, seen.unsqueeze(1), self.sink_H).squeeze(1)

    def _chunk(
        self,
        q_THD: Tensor,
        kv_TD: Tensor,
        picked: tuple[Tensor, Tensor] | None,
        span: Span,
        batch: Batch,
        cache: LayerCache,
    ) -> Tensor:
        window, device = self.config.sliding_window, q_THD.device
        q, new = q_THD[span.rows], kv_TD[span.rows].to(cache.window.dtype)
        positions = batch.positions_T[span.rows]
        past = torch.arange(max(0, span.start - window + 1), span.start, device=device)
        kv = torch.cat([cache.window[span.slot, past % window], new])
        age = positions.unsqueeze(-1) - torch.cat([past, positions])
        seen = (age >= 0) & (age < window)
        tail = positions[-window:] % window
        batch.write_later(span.slot, cache.window[span.slot], tail, new[-window:])
        entries = span.end // self.ratio if self.ratio else 0
        if not entries:
            return self._attend(q, kv, seen)
        assert cache.main is not None
        rows = batch.entry_rows(span, self.ratio, 0, entries)
        visible = torch.arange(entries, device=device) < (positions.unsqueeze(-1) + 1) // self.ratio
        if self.indexer is not None and entries > self.indexer.topk:
            assert picked is not None
            assert cache.index is not None
            keys = cache.index.entries[rows].unsqueeze(0)
            if entries > _DENSE_LIMIT * self.indexer.topk:
                return self._gather_chunk(
                    q, (kv, seen), (rows, visible), picked, span, keys, cache.main.entries
                )
            scores = self.indexer.score(
                picked[0][span.rows].unsqueeze(0), picked[1][span.rows].unsqueeze(0), keys
            ).squeeze(0)
            best = select(scores.masked_fill_(~visible, float("-inf")), self.indexer.topk)
            visible = visible & torch.zeros_like(visible).scatter_(1, best, True)
        return self._attend(
            q, torch.cat([kv, cache.main.entries[rows]]), torch.cat([seen, visible], dim=1)
        )

    def _attend(self, q_MHD: Tensor, kv_SD: Tensor, seen_MS: Tensor) -> Tensor:
        out = sink_attention(
            q_MHD.unsqueeze(0), kv_SD.unsqueeze(0), seen_MS.unsqueeze(0), self.sink_H
        )
        return out.squeeze(0)

    def _gather_chunk(
        self,
        q_MHD: Tensor,
        window: tuple[Tensor, Tensor],
        entries: tuple[Tensor, Tensor],
        picked: tuple[Tensor, Tensor],
        span: Span,
        keys: Tensor,
        pool: Tensor,
    ) -> Tensor:
        """Long contexts: every query gathers its own window and its own best entries."""
        assert self.indexer is not None
        (kv_SD, seen_MS), (rows_E, visible_ME) = window, entries
        out = torch.empty_like(q_MHD)
        width = min(self.config.sliding_window, kv_SD.shape[0])
        for first in range(0, q_MHD.shape[0], _GATHER_QUERIES):
            part = slice(first, first + _GATHER_QUERIES)
            at = slice(span.row + first, min(span.row + first + _GATHER_QUERIES, span.rows.stop))
            scores = self.indexer.score(
                picked[0][at].unsqueeze(0), picked[1][at].unsqueeze(0), keys
            ).squeeze(0)
            scores.masked_fill_(~visible_ME[part], float("-inf"))
            best = select(scores, self.indexer.topk)
            near = seen_MS[part].float().topk(width).indices
            kv = torch.cat([kv_SD[near], pool[rows_E[best]]], dim=1)
            seen = torch.cat(
                [seen_MS[part].gather(1, near), visible_ME[part].gather(1, best)], dim=1
            )
            out[part] = sink_attention(
                q_MHD[part].unsqueeze(1), kv, seen.unsqueeze(1), self.sink_H
            ).squeeze(1)
        return out
