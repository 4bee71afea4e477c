"""Attention as GPUs run it: packed weights, entries where they lie, no word to the host.

The same function as `attention.Attention`, cut into other kernels. A pass of decoding rows alone can be
captured in a graph: sizes come from tables' widths, and what is seen of them is read on the device.

Legend: T rows, H heads, D head_dim, E entries, K chosen ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whalepod.kernels.beside import Beside
from whalepod.kernels.decode_attention import Entries, decode_attention
from whalepod.kernels.entries import Pages, Rounding, round_rows
from whalepod.kernels.fp8_linear import Fp8Matrix, fp8_linear
from whalepod.kernels.index_scores import KeyFormat, index_scores
from whalepod.kernels.linear import grouped_linear, linear_wide
from whalepod.kernels.positions import pool_rows
from whalepod.kernels.prefill_attention import prefill_attention
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.select import select
from whalepod.kernels.window import window_rows
from whalepod.model.batch import Batch
from whalepod.model.cache import Compressed, LayerCache
from whalepod.model.compressor import Compressor
from whalepod.model.fidelity import Fidelity
from whalepod.model.matrix import Product, Weights
from whalepod.model.shape import ModelConfig

# Scores of a pass that lie in memory at once.
_SCORES = 1 << 26
_ANY = (1 << 31) - 1


class DeviceAttention:
    """One layer's attention; its kind follows from the layer's ratio.

    Args: as `attention.Attention`, with matrices in any form.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        prefix: str,
        freqs: Tensor,
        dtype: torch.dtype,
        fidelity: Fidelity,
    ) -> None:
        self.config, self.freqs, self.fidelity = config, freqs, fidelity
        self.ratio, kind = config.ratio(layer), config.kind(layer)
        self.rounding: Rounding = "kv" if fidelity.released else "none"
        w = {n.removeprefix(f"{prefix}."): t for n, t in weights.items() if n.startswith(prefix)}
        self.q_norm, self.kv_norm = w["q_norm.weight"], w["kv_norm.weight"]
        self.sink_H, self.wo_a = w["attn_sink"], w["wo_a.weight"]
        self.down = Product([w["wq_a.weight"], w["wkv.weight"]], fidelity)
        self.up = Product([w["wq_b.weight"]], fidelity)
        self.out = Product([w["wo_b.weight"]], fidelity)
        self.compressor: Compressor | None = None
        self.index: Index | None = None
        raw: list[Tensor] = []
        if kind != "swa":
            self.compressor = Compressor(
                config, layer, config.head_dim, w, "compressor", freqs, dtype, self.rounding
            )
            raw.append(self.compressor.weight)
        if kind == "csa":
            self.index = Index(config, layer, w, freqs, dtype, fidelity)
            raw += [self.index.compressor.weight, self.index.gate]
        self.raw_sizes = [part.shape[0] for part in raw]
        # These take the unrounded input, and their products are fp32.
        self.w_raw = torch.cat(raw) if raw else None

    def __call__(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend and project, `[T, hidden]`; see `attention.Attention`."""
        config, eps = self.config, self.config.rms_norm_eps
        low, kv = self.down(x_TD).split([config.q_lora_rank, config.head_dim], dim=-1)
        low, turns = rms_norm(low, self.q_norm, eps), batch.turns(self.freqs)
        with Beside(x_TD.device) as branch:
            # Position t replaces t - W, which no query from t on sees.
            own = window_rows(
                *(kv, self.kv_norm, turns, eps, self.rounding),
                *(cache.window, config.sliding_window, batch.slots_D, batch.positions_T),
            )
            entries = self._entries(x_TD, low, turns, batch, cache)
        heads = (config.num_attention_heads, config.head_dim)
        q = norm_rotate(self.up(low).unflatten(-1, heads), None, turns, eps)
        branch.join()
        out = self._attend(q, own, entries, turns, batch, cache.window).flatten(1)
        if isinstance(self.wo_a, Fp8Matrix):
            return self.out(fp8_linear(out, self.wo_a))
        wo_a = self.wo_a.unflatten(0, (config.o_groups, config.o_lora_rank))
        return self.out(grouped_linear(out.unflatten(1, (config.o_groups, -1)), wo_a))

    def _entries(
        self, x_TD: Tensor, low: Tensor, turns: Tensor, batch: Batch, cache: LayerCache
    ) -> Entries | None:
        """Update both compressors, and say what each row attends to."""
        if self.w_raw is None or self.compressor is None or cache.main is None:
            return None
        parts = linear_wide(x_TD, self.w_raw).split(self.raw_sizes, dim=-1)
        # The entry a token closes is visible to that token, so compression comes first.
        self.compressor.update(parts[0], batch, cache.main)
        seen_T, per = batch.seen(self.ratio, _ANY), batch.block_tokens // self.ratio
        some = Entries(cache.main.stored, seen_T, table_SB=batch.paged.table_SB, per=per)
        if self.index is None or cache.index is None:
            return some
        self.index.compressor.update(parts[1], batch, cache.index)
        if some.most <= self.index.topk:
            return some
        rows = self.index.choose(low, parts[2], turns, batch, some, cache.index)
        return Entries(some.pool, batch.seen(self.ratio, self.index.topk), rows_NK=rows, per=per)

    def _attend(
        self,
        q: Tensor,
        kv: Tensor,
        entries: Entries | None,
        turns: Tensor,
        batch: Batch,
        rings: Tensor,
    ) -> Tensor:
        n, at, paged = batch.decoding, batch.positions_T, batch.paged
        made = []
        if n:
            few = _part(entries, slice(0, n), slice(0, n))
            slots = paged.slots_T[:n]
            args = (q[:n], rings, slots, at[:n], few, self.sink_H, turns[:n])
            made.append(decode_attention(*args))
        if n < len(q):
            rest, chunks = slice(n, None), _part(entries, slice(n, None), slice(None))
            made.append(
                prefill_attention(
                    *(q[rest], kv[rest], rings, paged.slots_T[rest], at[rest]),
                    *(paged.starts_T[rest], chunks, paged.sequences_T[rest]),
                    *(self.sink_H, turns[rest]),
                )
            )
            for span in batch.chunks:
                batch.write_later(span.slot, rings, at[span.rows], kv[span.rows])
        return made[0] if len(made) == 1 else torch.cat(made)


class Index:
    """The indexer of a CSA layer: scores every entry that a row sees, keeps the best."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        w: Weights,
        freqs: Tensor,
        dtype: torch.dtype,
        fidelity: Fidelity,
    ) -> None:
        self.heads, self.dims = config.index_n_heads, config.index_head_dim
        self.topk, self.scale = config.index_topk, (self.heads * self.dims) ** -0.5
        self.rounding: Rounding = "index" if fidelity.released else "none"
        self.up = Product([w["indexer.wq_b.weight"]], fidelity)
        self.compressor = Compressor(
            config, layer, self.dims, w, "indexer.compressor", freqs, dtype, self.rounding
        )
        self.gate: Tensor = w["indexer.weights_proj.weight"].to(self.compressor.weight.dtype)

    def choose(
        self,
        low: Tensor,
        gate_TH: Tensor,
        turns: Tensor,
        batch: Batch,
        seen: Entries,
        state: Compressed,
    ) -> Tensor:
        """Flat pool rows of the best entries, `[T, K]`; those that a row sees come first."""
        table, per = batch.paged.table_SB, seen.per
        q = norm_rotate(self.up(low).unflatten(-1, (self.heads, self.dims)), None, turns, -1.0)
        q = round_rows(q, self.rounding)
        made = []
        count = max(1, _SCORES // seen.most)
        for first in range(0, len(q), count):
            part = slice(first, first + count)
            sequences = batch.paged.sequences_T[part]
            kind: KeyFormat = "fp4" if isinstance(state.entries, Pages) else "rows"
            scores = index_scores(
                *(q[part], gate_TH[part], state.stored, kind, per),
                *(table, sequences, seen.seen_N[part], self.scale),
            )
            best = select(scores, self.topk)
            made.append(pool_rows(best, table, sequences, per))
        return made[0] if len(made) == 1 else torch.cat(made)


def _part(entries: Entries | None, rows: slice, sequences: slice) -> Entries | None:
    if entries is None:
        return None
    if entries.rows_NK is not None:
        return replace(entries, seen_N=entries.seen_N[rows], rows_NK=entries.rows_NK[rows])
    assert entries.table_SB is not None
    return replace(entries, seen_N=entries.seen_N[rows], table_SB=entries.table_SB[sequences])
