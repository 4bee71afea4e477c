"""The router's choice: which experts a token goes to, and with what weight.

Legend: T tokens, K experts per token, E routed experts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from whalepod.kernels.gate import gate
from whalepod.kernels.linear import linear_wide
from whalepod.kernels.routes import choose_experts
from whalepod.model.shape import ModelConfig


@dataclass(frozen=True, slots=True)
class Routes:
    """Expert ids `[T, K]` int64 and weights `[T, K]` fp32. The order in K fixes the order of sums."""

    experts_TK: Tensor
    weights_TK: Tensor


class Gate:
    """One layer's gate: by score with a selection bias, or by token id in hash layers."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weight: Tensor,
        bias: Tensor | None,
        tid2eid: Tensor | None,
    ) -> None:
        self.config = config
        self.weight_ED, self.bias_E, self.table_VK = weight, bias, tid2eid
        assert (tid2eid is not None) == config.is_hash(layer)

    @classmethod
    def of(
        cls, config: ModelConfig, layer: int, weights: Mapping[str, Tensor], prefix: str
    ) -> Gate:
        """Take `{prefix}.ffn.gate.*` from `weights`."""
        name = f"{prefix}.ffn.gate"
        hashed = config.is_hash(layer)
        return cls(
            config,
            layer,
            weights[f"{name}.weight"],
            None if hashed else weights[f"{name}.bias"],
            weights[f"{name}.tid2eid"] if hashed else None,
        )

    def route(self, x_TD: Tensor, token_ids_T: Tensor) -> Routes:
        """Choose experts.

        Scores are `sqrt(softplus(x Wᵀ))` in fp32. The bias takes part in the selection only;
        weights are the chosen scores, normalised to 1, times `routed_scaling_factor`.

        Args:
            x_TD: `[T, D]`, the block input after `ffn_norm`.
            token_ids_T: `[T]` int64; read in hash layers. Ids outside the vocabulary are clamped.
        """
        if gate.has_twin(x_TD.device.type):
            count, factor = self.config.num_experts_per_tok, self.config.routed_scaling_factor
            given = (self.bias_E, self.table_VK, token_ids_T)
            return Routes(*gate(x_TD, self.weight_ED, count, factor, *given))
        logits_TE, given_TK = linear_wide(x_TD, self.weight_ED), None
        if self.table_VK is not None:
            given_TK = self.table_VK[token_ids_T.clamp(0, self.table_VK.shape[0] - 1)]
        count, factor = self.config.num_experts_per_tok, self.config.routed_scaling_factor
        return Routes(*choose_experts(logits_TE, self.bias_E, given_TK, count, factor))
