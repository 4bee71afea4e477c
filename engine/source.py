"""Weights for each role, read from a checkpoint when a member needs them."""

from __future__ import annotations

import torch

from whalepod.config import Model
from whalepod.engine.attention import AttentionStage
from whalepod.engine.drafter import Drafter
from whalepod.engine.expert import ExpertShard, Held, Loaded, fill
from whalepod.engine.grammar import Grammars
from whalepod.engine.router import Router
from whalepod.errors import ConfigError
from whalepod.kernels.jit import what_is_missing
from whalepod.kernels.registry import load_twins
from whalepod.model.cache import Format
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.expert import Expert
from whalepod.model.fidelity import Fidelity
from whalepod.model.gate import Gate
from whalepod.model.mtp import MTP
from whalepod.model.rope import frequencies
from whalepod.model.shape import ModelConfig
from whalepod.model.stack import ExpertStack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Source:
    """Builds roles from a checkpoint; each reads only its own slices.

    Args:
        model: the `model` section of the configuration.
        checkpoint: opened and verified.
        device: where weights go.
        packed: keep matrices as the checkpoint stores them, for kernels that widen them; None does
            so on GPUs.

    Raises:
        ConfigError: a GPU's kernels cannot be compiled here.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        packed: bool | None = None,
    ) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        if self.device.type == "cuda" and (lacking := what_is_missing()):
            raise ConfigError(f"this GPU's kernels cannot be compiled: {lacking}")
        self.config: ModelConfig = checkpoint.config
        self.dtype = DTYPES[model.dtype]
        self.fidelity = Fidelity(model.fidelity)
        self.packed = self.device.type == "cuda" if packed is None else packed
        self.stacked = self.packed and checkpoint.expert_dtype == "fp4"
        load_twins(self.device.type)

    def gate(self, layer: int) -> Gate:
        """Read one layer's gate."""
        last = self.config.num_hidden_layers
        prefix = f"layers.{layer}" if layer < last else MTP.prefix
        weights = self.checkpoint.router(
            [layer], dtype=self.dtype, device=self.device, packed=self.packed
        )
        return Gate.of(self.config, layer, weights, prefix)

    def table(self) -> Held:
        """An empty table of a layer's experts."""
        if not self.stacked:
            return {}
        limit, released = self.config.swiglu_limit, self.fidelity.released
        return ExpertStack(self.config.n_routed_experts, limit, released, self.device)

    def experts(self, layer: int) -> Held:
        """Read all routed experts of a layer."""
        held = self.table()
        fill(held, [*range(self.config.n_routed_experts)], lambda e: self.expert(layer, e))
        return held

    def expert(self, layer: int, expert: int) -> Loaded:
        """Read one routed expert, for a table."""
        if self.stacked:
            return self.checkpoint.packed_expert(layer, expert, self.device)
        w1, w2, w3 = self.checkpoint.expert(layer, expert, dtype=self.dtype, device=self.device)
        return Expert(w1, w2, w3, self.config.swiglu_limit, self.fidelity)

    def stage(
        self, layers: range, *, slots: int, blocks: int, format: Format = "plain"
    ) -> AttentionStage:
        """Read the attention side of some layers, and the ends of the model that go with them."""
        weights = self.checkpoint.attention(
            layers,
            dtype=self.dtype,
            device=self.device,
            embed=layers.start == 0,
            head=layers.stop == self.config.num_hidden_layers,
            packed=self.packed,
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
            format=format,
        )

    def drafter(self, stage: AttentionStage, *, slots: int) -> Drafter:
        """Read the MTP block with its experts, beside a stage that embeds and has the head."""
        if not self.config.num_nextn_predict_layers:
            raise ConfigError(
                f"{self.checkpoint.path} has no MTP block (num_nextn_predict_layers is 0), so it "
                "cannot draft; set engine.draft_tokens to 0"
            )
        assert stage.embedding is not None
        assert stage.head is not None
        layer = self.config.num_hidden_layers
        weights = self.checkpoint.attention(
            [layer], dtype=self.dtype, device=self.device, packed=self.packed
        )
        freqs = frequencies(self.config, layer).to(self.device)
        return Drafter(
            self.config,
            MTP(self.config, weights, freqs, self.dtype, self.fidelity),
            self.gate(layer),
            self.experts(layer),
            stage.embedding,
            stage.head.weight_VD,
            slots=slots,
        )

    def grammars(self) -> Grammars | None:
        """What structured output needs, None without a tokenizer; nothing is read yet."""
        folder, config = self.checkpoint.path, self.config
        return Grammars.open(folder, config.vocab_size, config.eos_token_id)

    def router(self) -> Router:
        """A router without gates yet; `place` reads them."""
        return Router(self.config, self.gate, self.dtype, self.device)

    def shard(self) -> ExpertShard:
        """An expert shard without experts yet; `prepare` reads them."""
        return ExpertShard(self.config, self.expert, self.dtype, self.device, self.table)
