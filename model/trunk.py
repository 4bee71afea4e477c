"""The two ends of the model: token ids to streams, and streams to logits.

Legend: T tokens, C residual streams, D width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.linear import linear_wide
from whalepod.model.matrix import Weights
from whalepod.model.mhc import HyperHead
from whalepod.model.shape import ModelConfig


def embed(table_VD: Tensor, ids_T: Tensor, streams: int) -> Tensor:
    """Look tokens up and copy each into all residual streams, `[T, C, D]`; not scaled."""
    return table_VD[ids_T].unsqueeze(1).repeat(1, streams, 1)


class Head:
    """`hc_head`, final norm and LM head; the product is fp32."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.collapse = HyperHead(config, weights, "hc_head")
        self.norm = weights["norm.weight"]
        self.weight_VD = weights["head.weight"]

    def __call__(self, x_TCD: Tensor) -> Tensor:
        """Streams after the last layer -> logits `[T, V]` fp32."""
        y_TD = self.collapse(x_TCD, self.norm)
        return linear_wide(y_TD, self.weight_VD)
