"""Weights for each role, read from a checkpoint when a member needs them."""

from __future__ import annotations

import torch

from whalepod.config import Model
from whalepod.engine.attention import AttentionStage
from whalepod.engine.expert import ExpertShard
from whalepod.engine.router import Router
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.expert import Expert
from whalepod.model.fidelity import Fidelity
from whalepod.model.gate import Gate
from whalepod.model.shape import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Source:
    """Builds roles from a checkpoint; each reads only its own slices.

    Args:
        model: the `model` section of the configuration.
        checkpoint: opened and verified.
        device: where weights go.
    """

    def __init__(
        self, model: Model, checkpoint: Checkpoint, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.config: ModelConfig = checkpoint.config
        self.dtype = DTYPES[model.dtype]
        self.fidelity = Fidelity(model.fidelity)

    def gate(self, layer: int) -> Gate:
        """Read one layer's gate."""
        weights = self.checkpoint.router([layer], device=self.device)
        return Gate.of(self.config, layer, weights, f"layers.{layer}")

    def expert(self, layer: int, expert: int) -> Expert:
        """Read one routed expert."""
        w1, w2, w3 = self.checkpoint.expert(layer, expert, dtype=self.dtype, device=self.device)
        return Expert(w1, w2, w3, self.config.swiglu_limit, self.fidelity)

    def stage(self, layers: range, *, slots: int, blocks: int) -> AttentionStage:
        """Read the attention side of some layers, and the ends of the model that go with them."""
        weights = self.checkpoint.attention(
            layers,
            dtype=self.dtype,
            device=self.device,
            embed=layers.start == 0,
            head=layers.stop == self.config.num_hidden_layers,
        )
        return AttentionStage(
            self.config,
            layers,
            weights,
            slots=slots,
            blocks=blocks,
            dtype=self.dtype,
            fidelity=self.fidelity,
            device=self.device,
        )

    def router(self) -> Router:
        """A router without gates yet; `place` reads them."""
        return Router(self.config, self.gate, self.dtype, self.device)

    def shard(self) -> ExpertShard:
        """An expert shard without experts yet; `prepare` reads them."""
        return ExpertShard(self.config, self.expert, self.dtype, self.device)
