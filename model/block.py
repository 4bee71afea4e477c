"""One layer, cut in two where its tokens leave for the experts.

Legend: T tokens, C residual streams, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.kernels.fp8_linear import Fp8Matrix
from whalepod.kernels.hyper_connection import hc_post
from whalepod.model.attention import Attention
from whalepod.model.batch import Batch
from whalepod.model.cache import LayerCache
from whalepod.model.device_attention import DeviceAttention
from whalepod.model.expert import shared_expert
from whalepod.model.fidelity import Fidelity
from whalepod.model.matrix import Weights
from whalepod.model.mhc import HyperConnection
from whalepod.model.shape import ModelConfig


class Opened(NamedTuple):
    """A layer's streams, what attention takes of them, and how to spread what it makes."""

    x_TCD: Tensor
    attn_in_TD: Tensor
    post_TC: Tensor
    comb_TCC: Tensor


@dataclass(frozen=True, slots=True)
class Half:
    """What a layer keeps at home while its tokens visit the experts."""

    x_TCD: Tensor
    post_TC: Tensor
    comb_TCC: Tensor
    ffn_in_TD: Tensor


class Block:
    """The attention side of a layer: all of it but the routed experts and the gate."""

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
        self.layer = layer
        self.hc_attn = HyperConnection(config, weights, f"{prefix}.hc_attn")
        self.hc_ffn = HyperConnection(config, weights, f"{prefix}.hc_ffn")
        self.attn_norm = weights[f"{prefix}.attn_norm.weight"]
        self.ffn_norm = weights[f"{prefix}.ffn_norm.weight"]
        packed = isinstance(weights[f"{prefix}.attn.wq_a.weight"], Fp8Matrix)
        kind = DeviceAttention if packed else Attention
        self.attention = kind(config, layer, weights, f"{prefix}.attn", freqs, dtype, fidelity)
        self.shared = shared_expert(
            weights, f"{prefix}.ffn.shared_experts", config.swiglu_limit, fidelity
        )

    def before(self, x_TCD: Tensor, batch: Batch, cache: LayerCache) -> Half:
        """Run up to the experts' input: `half.ffn_in_TD` is what travels."""
        return self.attend(self.open(x_TCD), batch, cache)

    def open(self, x_TCD: Tensor) -> Opened:
        """Collapse the streams."""
        return Opened(x_TCD, *self.hc_attn.pre(x_TCD, self.attn_norm))

    def follow(self, half: Half, routed_TD: Tensor, shared_TD: Tensor) -> Opened:
        """`after` of the layer before, which kept `half`, then `open` of this one, at once."""
        kept = half.x_TCD, half.post_TC, half.comb_TCC
        return Opened(*self.hc_attn.post_pre(routed_TD, *kept, self.attn_norm, shared_TD))

    def attend(self, opened: Opened, batch: Batch, cache: LayerCache) -> Half:
        """Run attention, and up to the experts' input."""
        x_TCD, a_TD, post, comb = opened
        f_TD = self.attention(a_TD, batch, cache)
        x_TCD, f_TD, post, comb = self.hc_ffn.post_pre(f_TD, x_TCD, post, comb, self.ffn_norm)
        return Half(x_TCD, post, comb, f_TD)

    def share(self, half: Half) -> Tensor:
        """Run the shared expert, `[T, D]`; done while the legs are under way."""
        return self.shared(half.ffn_in_TD)

    def after(self, half: Half, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """Add what the routed experts sent back and close the layer.

        Args:
            routed_TD: fp32 sums, or `[T, K, D]`, yet to be added up in order.
        """
        return hc_post(routed_TD, half.x_TCD, half.post_TC, half.comb_TCC, shared_TD)
