"""An attention stage: a contiguous range of layers, their KV state, and an end of the model.

Legend: T rows, C residual streams, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.engine.drafter import Drafter
from whalepod.engine.experts import Experts
from whalepod.engine.grammar import Grammars
from whalepod.engine.graph import DecodeGraphs
from whalepod.model.batch import Batch
from whalepod.model.block import Block, Half
from whalepod.model.cache import Cache, Format
from whalepod.model.fidelity import Fidelity
from whalepod.model.rope import frequencies
from whalepod.model.shape import ModelConfig
from whalepod.model.trunk import Head, embed


class AttentionStage:
    """The attention side of `layers`; the first stage embeds, the last has the head.

    Args:
        weights: official names; those of these layers, and `embed.weight` or the head's where due.
        slots, blocks: room for sequences and for blocks of compressed entries.
        format: how those are stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        weights: Mapping[str, Tensor],
        *,
        slots: int,
        blocks: int,
        dtype: torch.dtype,
        fidelity: Fidelity,
        device: torch.device | str = "cpu",
        format: Format = "plain",
    ) -> None:
        self.config, self.layers, self.dtype = config, layers, dtype
        self.device = torch.device(device)
        tables = {config.ratio(i): frequencies(config, i).to(device) for i in layers}
        self.blocks = [
            Block(config, i, weights, f"layers.{i}", tables[config.ratio(i)], dtype, fidelity)
            for i in layers
        ]
        self.embedding = weights.get("embed.weight")
        last = layers.stop == config.num_hidden_layers
        self.head = Head(config, weights) if last else None
        self.drafter: Drafter | None = None
        self.graphs: DecodeGraphs | None = None
        self.weight_bytes = sum(w.nbytes for w in weights.values())
        self.cache = Cache(
            config, layers, slots=slots, blocks=blocks, dtype=dtype, device=device, format=format
        )
        self.grammars: Grammars | None = None

    def embed(self, batch: Batch) -> Tensor:
        """Streams that enter layer 0, `[T, C, D]`."""
        assert self.embedding is not None
        return embed(self.embedding, batch.ids_T, self.config.hc_mult)

    def forward(
        self, batches: Seq[Batch | None], streams: Seq[Tensor], experts: Experts
    ) -> list[Tensor]:
        """Run the layers over micro-batches: one computes while the others travel.

        Args:
            batches: one a micro-batch; None where only other members have rows.
            streams: `[T, C, D]` each.

        Returns:
            the streams after the last layer. Nothing of `batches` is committed.
        """
        x = list(streams)
        halves: list[tuple[Half, Tensor] | None] = [None] * len(x)
        none = torch.zeros(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        for block in self.blocks:
            cache = self.cache.layers[block.layer]
            for m, batch in enumerate(batches):
                first = block.layer == self.layers.start
                routed = None if first else experts.receive(block.layer - 1, m)
                if batch is None:
                    experts.send(block.layer, m, none, none[:, 0].long())
                    continue
                if (kept := halves[m]) is None or routed is None:
                    opened = block.open(x[m])
                else:
                    opened = block.follow(kept[0], routed, kept[1])
                # What the layer before has left is closed; attention needs the memory.
                kept = routed = halves[m] = None
                half = block.attend(opened, batch, cache)
                experts.send(block.layer, m, half.ffn_in_TD, batch.ids_T)
                halves[m] = (half, block.share(half))
        last = self.blocks[-1]
        for m, kept in enumerate(halves):
            routed = experts.receive(last.layer, m)
            if kept is not None:
                x[m] = last.after(kept[0], routed, kept[1])
        return x

    def logits(self, x_TCD: Tensor, rows: list[int]) -> Tensor:
        """Logits of some rows of the last layer's streams, `[len(rows), V]` fp32."""
        assert self.head is not None
        return self.head(x_TCD[torch.tensor(rows, dtype=torch.int64, device=x_TCD.device)])
