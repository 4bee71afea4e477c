"""The whole model in one process: the reference that every layout must equal.

It runs the same `Block`, `Gate` and `Expert` objects as the members of a cluster do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whalepod.errors import OutOfBlocks
from whalepod.kernels.linear import linear_wide
from whalepod.model.batch import Batch, Span
from whalepod.model.block import Block
from whalepod.model.cache import Cache
from whalepod.model.expert import Expert
from whalepod.model.fidelity import Fidelity
from whalepod.model.gate import Gate
from whalepod.model.moe import mixture
from whalepod.model.mtp import MTP
from whalepod.model.rope import frequencies
from whalepod.model.shape import ModelConfig
from whalepod.model.trunk import Head, embed


@dataclass(slots=True)
class State:
    """One sequence of a `WholeModel`: its place in the cache and its length so far."""

    slot: int
    blocks: tuple[int, ...]
    length: int = 0


def expert_table(
    config: ModelConfig, weights: Mapping[str, Tensor], prefix: str, fidelity: Fidelity
) -> dict[int, Expert]:
    """All routed experts of one layer, by id."""
    return {
        e: Expert.of(weights, f"{prefix}.ffn.experts.{e}", config.swiglu_limit, fidelity)
        for e in range(config.n_routed_experts)
    }


class WholeModel:
    """Embedding, all layers with their experts, head, and the MTP block where there is one.

    Args:
        config: sizes.
        weights: official tensor names, dequantised.
        dtype: compute type of everything that is not fp32 by design.
        fidelity: `released` rounds activations as the released weights were trained for.
        slots, blocks: room in the cache: sequences, and blocks of entries over all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        fidelity: Literal["plain", "released"] = "plain",
        slots: int = 8,
        blocks: int = 64,
    ) -> None:
        self.config, self.dtype, rounding = config, dtype, Fidelity(fidelity)
        self.embedding, self.head = weights["embed.weight"].to(dtype), Head(config, weights)
        freqs = {r: frequencies(config, i) for i, r in enumerate(config.compress_ratios)}
        self.blocks, self.gates, self.experts = [], [], []
        for layer in config.layers:
            name = f"layers.{layer}"
            table = freqs[config.ratio(layer)]
            self.blocks.append(Block(config, layer, weights, name, table, dtype, rounding))
            self.gates.append(Gate.of(config, layer, weights, name))
            self.experts.append(expert_table(config, weights, name, rounding))
        self.mtp: MTP | None = None
        layers = config.num_hidden_layers
        if config.num_nextn_predict_layers and f"{MTP.prefix}.e_proj.weight" in weights:
            self.mtp = MTP(config, weights, frequencies(config, layers), dtype, rounding)
            self.gates.append(Gate.of(config, layers, weights, MTP.prefix))
            self.experts.append(expert_table(config, weights, MTP.prefix, rounding))
            layers += 1
        self.cache = Cache(config, range(layers), slots=slots, blocks=blocks, dtype=dtype)
        self._free_slots = list(range(slots))
        self._free_blocks = list(range(blocks))

    def new_state(self, max_tokens: int) -> State:
        """Reserve room for one sequence of up to `max_tokens`. Raises OutOfBlocks."""
        wanted = -(-max_tokens // self.cache.block_tokens)
        if not self._free_slots:
            raise OutOfBlocks(1, 0, "sequence slots")
        if wanted > len(self._free_blocks):
            raise OutOfBlocks(wanted, len(self._free_blocks))
        taken, self._free_blocks = self._free_blocks[:wanted], self._free_blocks[wanted:]
        return State(self._free_slots.pop(0), tuple(taken))

    def release(self, state: State) -> None:
        """Give a sequence's room back."""
        self._free_slots.append(state.slot)
        self._free_blocks += state.blocks

    def forward(self, state: State, ids: Sequence[int]) -> Tensor:
        """Append tokens to one sequence; returns logits `[n, V]` fp32 for each of them."""
        return self.forward_batch([state], [ids])[0]

    def forward_batch(
        self, states: Sequence[State], chunks: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Append a chunk to each of several sequences in one pass; logits per sequence."""
        order = sorted(range(len(states)), key=lambda i: len(chunks[i]) > 1)
        batch = self._batch([states[i] for i in order], [chunks[i] for i in order])
        logits = self.head(self._streams(batch))
        batch.commit()
        for i in order:
            states[i].length += len(chunks[i])
        by_place = dict(zip(order, (logits[s.rows] for s in batch.spans), strict=True))
        return [by_place[i] for i in range(len(states))]

    def mtp_logits(self, ids: Sequence[int]) -> Tensor:
        """Teacher-forced drafts on a fresh sequence: row i predicts token i + 2, `[n - 1, V]`."""
        assert self.mtp is not None
        state = self.new_state(len(ids))
        batch = self._batch([state], [ids])
        x_TCD = self._streams(batch)
        after = Batch.of(
            ids[1:], [Span(state.slot, 0, 0, len(ids) - 1, state.blocks)], batch.block_tokens
        )
        z_TCD = self.mtp.join(x_TCD[:-1], self.embedding[after.ids_T])
        z_TCD = self._layer(self.mtp.block, z_TCD, after)
        self.release(state)
        return linear_wide(self.mtp.collapse(z_TCD), self.head.weight_VD)

    def _batch(self, states: Sequence[State], chunks: Sequence[Sequence[int]]) -> Batch:
        spans, row = [], 0
        for state, chunk in zip(states, chunks, strict=True):
            spans.append(Span(state.slot, state.length, row, len(chunk), state.blocks))
            row += len(chunk)
        return Batch.of([t for c in chunks for t in c], spans, self.cache.block_tokens)

    def _streams(self, batch: Batch) -> Tensor:
        x_TCD = embed(self.embedding, batch.ids_T, self.config.hc_mult)
        for block in self.blocks:
            x_TCD = self._layer(block, x_TCD, batch)
        return x_TCD

    def _layer(self, block: Block, x_TCD: Tensor, batch: Batch) -> Tensor:
        half = block.before(x_TCD, batch, self.cache.layers[block.layer])
        routes = self.gates[block.layer].route(half.ffn_in_TD, batch.ids_T)
        routed = mixture(half.ffn_in_TD, routes, self.experts[block.layer])
        return block.after(half, routed, block.share(half))
