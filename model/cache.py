"""The state a sequence leaves behind in each layer.

Two kinds of storage, both shared by all sequences of an attention member: rings (one slot per
sequence, addressed by position) for raw window keys and open compressor windows, and paged pools
(blocks of tokens) for compressed entries, which grow with the sequence.

Legend: N slots, W window, R ring rows, F flat pool rows, D head_dim, I index_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.model.shape import ModelConfig


def block_tokens(config: ModelConfig) -> int:
    """Tokens of one block: the least common multiple of all ratios, at least 128."""
    return math.lcm(128, *(r for r in config.compress_ratios if r))


@dataclass(frozen=True, slots=True)
class Compressed:
    """Pool and open window of one compressor.

    `entries` is `[F, D]`. `raw` is `[N, R, 2, coff * D]` fp32: rows (c, s) of the open window and,
    for ratio 4, of the window before it; the gate logits s already contain the position bias.
    """

    entries: Tensor
    raw: Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """State of one layer: `window` is `[N, W, D]`; the others exist by layer kind."""

    window: Tensor
    main: Compressed | None = None
    index: Compressed | None = None


class Cache:
    """State of a range of layers for up to `slots` sequences and `blocks` blocks of entries."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        *,
        slots: int,
        blocks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.slots, self.blocks = config, slots, blocks
        self.block_tokens = block_tokens(config)
        self._dtype, self._device = dtype, device
        self.layers = {layer: self._layer(layer) for layer in layers}

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        tensors = [c.window for c in self.layers.values()]
        for layer in self.layers.values():
            for part in (layer.main, layer.index):
                if part is not None:
                    tensors += [part.entries, part.raw]
        return sum(t.nbytes for t in tensors)

    def copy_slot(self, src: int, dst: int) -> None:
        """Make one slot's rings those of another, in every layer."""
        for layer in self.layers.values():
            layer.window[dst] = layer.window[src]
            for part in (layer.main, layer.index):
                if part is not None:
                    part.raw[dst] = part.raw[src]

    def _layer(self, layer: int) -> LayerCache:
        config, kind = self.config, self.config.kind(layer)
        window = torch.zeros(
            self.slots,
            config.sliding_window,
            config.head_dim,
            dtype=self._dtype,
            device=self._device,
        )
        if kind == "swa":
            return LayerCache(window)
        main = self._compressed(layer, config.head_dim)
        if kind == "hca":
            return LayerCache(window, main)
        return LayerCache(window, main, self._compressed(layer, config.index_head_dim))

    def _compressed(self, layer: int, dim: int) -> Compressed:
        ratio = self.config.ratio(layer)
        overlap = 2 if ratio == 4 else 1
        flat = self.blocks * (self.block_tokens // ratio)
        entries = torch.zeros(flat, dim, dtype=self._dtype, device=self._device)
        raw = torch.zeros(self.slots, overlap * ratio, 2, overlap * dim, device=self._device)
        return Compressed(entries, raw)
