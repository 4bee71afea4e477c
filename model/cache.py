"""The state a sequence leaves behind in each layer.

Two kinds of storage, both shared by all sequences of an attention member: rings (one slot per
sequence, addressed by position) for raw window keys and open compressor windows, and paged pools
(blocks of tokens) for compressed entries, which grow with the sequence.

Legend: N slots, W window, R ring rows, F flat pool rows, D head_dim, I index_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whalepod.kernels.entries import KV_BLOCK, Pages, Storage
from whalepod.kernels.quantise import FP4_GROUP
from whalepod.model.shape import ModelConfig

# How compressed entries are stored: in the activations' dtype, or as released.
Format = Literal["plain", "released"]


def block_tokens(config: ModelConfig) -> int:
    """Tokens of one block: the least common multiple of all ratios, at least 128."""
    return math.lcm(128, *(r for r in config.compress_ratios if r))


@dataclass(frozen=True, slots=True)
class Compressed:
    """Pool and open window of one compressor.

    `entries` is `[F, D]`, or pages of one block each: key/value entries in FP8 with BF16 rotary dims,
    index keys in FP4. `raw` is `[N, R, 2, coff * D]` fp32: rows (c, s) of the open window and,
    for ratio 4, of the window before it; the gate logits s already contain the position bias.
    """

    entries: Storage
    raw: Tensor

    @property
    def stored(self) -> Tensor:
        """The pool itself."""
        return self.entries.bytes if isinstance(self.entries, Pages) else self.entries


@dataclass(frozen=True, slots=True)
class LayerCache:
    """State of one layer: `window` is `[N, W, D]`; the others exist by layer kind."""

    window: Tensor
    main: Compressed | None = None
    index: Compressed | None = None

    @property
    def plain(self) -> bool:
        """Whether entries lie in the compute type."""
        return self.main is None or not isinstance(self.main.entries, Pages)


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
        format: Format = "plain",
    ) -> None:
        self.format = format
        self.config, self.slots, self.blocks = config, slots, blocks
        self.block_tokens = block_tokens(config)
        self._dtype, self._device = dtype, device
        self.layers = {layer: self._layer(layer) for layer in layers}

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes allocated for each kind of state."""
        layers = list(self.layers.values())
        pools = [p for layer in layers for p in (layer.main, layer.index) if p is not None]
        return {
            "window rings": sum(layer.window.nbytes for layer in layers),
            "compressor rows": sum(pool.raw.nbytes for pool in pools),
            "main entries": sum(x.main.stored.nbytes for x in layers if x.main is not None),
            "index entries": sum(x.index.stored.nbytes for x in layers if x.index is not None),
        }

    @property
    def token_bytes(self) -> float:
        """Bytes that one more token of a sequence takes, from what is allocated."""
        parts = self.parts
        held = parts["main entries"] + parts["index entries"]
        return held / (self.blocks * self.block_tokens)

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
        rotary = config.qk_rope_head_dim
        main = self._compressed(layer, config.head_dim, rotary)
        if kind == "hca":
            return LayerCache(window, main)
        return LayerCache(window, main, self._compressed(layer, config.index_head_dim))

    def _compressed(self, layer: int, dim: int, rotary: int | None = None) -> Compressed:
        """`rotary` dims at the end of a key/value entry; None makes room for index keys."""
        ratio = self.config.ratio(layer)
        overlap = 2 if ratio == 4 else 1
        flat = self.blocks * (self.block_tokens // ratio)
        entries: Storage
        if self.format == "released":
            entries = self._pages(self.block_tokens // ratio, dim, rotary)
        else:
            entries = torch.zeros(flat, dim, dtype=self._dtype, device=self._device)
        raw = torch.zeros(self.slots, overlap * ratio, 2, overlap * dim, device=self._device)
        return Compressed(entries, raw)

    def _pages(self, per: int, dim: int, rotary: int | None) -> Pages:
        data, scales = dim // 2, dim // FP4_GROUP
        if rotary is not None:
            # One scale for 64 plain dims, and padding to a multiple of 8.
            data = dim + rotary
            scales = -(-(dim - rotary) // (8 * KV_BLOCK)) * 8
        stride = per * (data + scales)
        return Pages(
            torch.zeros(self.blocks, stride, dtype=torch.uint8, device=self._device),
            *(per, data, scales),
        )
