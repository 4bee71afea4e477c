"""The multi-token-prediction block: drafts the token after the next.

Legend: T tokens, C residual streams, D width, V vocabulary.
Source: DeepSeek-V4 inference/model.py, MTPBlock.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.rms_norm import rms_norm
from whalepod.model.block import Block
from whalepod.model.fidelity import Fidelity
from whalepod.model.matrix import Product, Weights
from whalepod.model.mhc import HyperHead
from whalepod.model.shape import ModelConfig


class MTP:
    """`mtp.0.*`: two input projections, one window-attention block, an own head collapse.

    The embedding table and the LM head are the main model's. The block's experts are reached as
    those of layer `num_hidden_layers`.
    """

    prefix = "mtp.0"

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        freqs: Tensor,
        dtype: torch.dtype,
        fidelity: Fidelity,
    ) -> None:
        self.layer, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.block = Block(config, self.layer, weights, self.prefix, freqs, dtype, fidelity)
        self.head = HyperHead(config, weights, f"{self.prefix}.hc_head")
        self.e_proj = Product([weights[f"{self.prefix}.e_proj.weight"]], fidelity)
        self.h_proj = Product([weights[f"{self.prefix}.h_proj.weight"]], fidelity)
        self.enorm, self.hnorm, self.norm = (
            weights[f"{self.prefix}.{n}.weight"] for n in ("enorm", "hnorm", "norm")
        )

    def join(self, x_TCD: Tensor, next_embedding_TD: Tensor) -> Tensor:
        """Merge the main model's streams at position i with the embedding of token i + 1.

        Args:
            x_TCD: `[T, C, D]` streams after the last layer, before `hc_head`.
            next_embedding_TD: `[T, D]`, unscaled.

        Returns:
            `[T, C, D]`, the streams that enter the block.
        """
        e_TD = self.e_proj(rms_norm(next_embedding_TD, self.enorm, self.eps))
        z = rms_norm(x_TCD, self.hnorm, self.eps).flatten(0, 1)
        return self.h_proj(z).view(x_TCD.shape) + e_TD.unsqueeze(1)

    def collapse(self, z_TCD: Tensor) -> Tensor:
        """Streams after the block -> the LM head's input, `[T, D]`."""
        return self.head(z_TCD, self.norm)
