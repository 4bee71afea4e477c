"""Every tensor of a released checkpoint: name, stored shape and type, and whose it is.

Source: `model.safetensors.index.json` and the tensor headers of DeepSeek-V4-Pro and -Flash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from whalepod.model.shape import ModelConfig


class Role(Enum):
    """Which part of the system reads a tensor."""

    EMBED = "embed"
    ATTENTION = "attention"
    SHARED = "shared expert"
    ROUTER = "router"
    EXPERT = "routed experts"
    HEAD = "head"


class Stored(Enum):
    """How a tensor lies in the file; the value is the safetensors name."""

    BF16 = "BF16"
    F32 = "F32"
    I64 = "I64"
    FP8 = "F8_E4M3"
    FP4 = "I8"
    SCALE = "F8_E8M0"


_BYTES = {
    Stored.BF16: 2,
    Stored.F32: 4,
    Stored.I64: 8,
    Stored.FP8: 1,
    Stored.FP4: 1,
    Stored.SCALE: 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the file must hold it.

    `layer` is `num_hidden_layers` for the MTP block. `scale` names the sibling of a quantised
    matrix. `keep_fp32` marks what is computed in fp32 whatever the compute type.
    """

    name: str
    shape: tuple[int, ...]
    stored: Stored
    role: Role
    layer: int | None = None
    expert: int | None = None
    scale: str | None = None
    keep_fp32: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _BYTES[self.stored]

    @property
    def parameters(self) -> int:
        """Logical parameters: FP4 pairs count twice, scales and integer tables not at all."""
        if self.stored in (Stored.SCALE, Stored.I64):
            return 0
        return math.prod(self.shape) * (2 if self.stored is Stored.FP4 else 1)


ExpertDtype = Literal["fp4", "fp8"]


def tensor_specs(config: ModelConfig, expert_dtype: ExpertDtype = "fp4") -> dict[str, TensorSpec]:
    """List every tensor of a checkpoint of this configuration, by name."""
    table = _Table(config, expert_dtype)
    found = [*table.ends()]
    for layer in config.layers:
        found += table.layer(f"layers.{layer}", layer)
    for block in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + block
        found += table.layer(f"mtp.{block}", layer)
        found += table.mtp(f"mtp.{block}", layer)
    return {spec.name: spec for spec in found}


class _Table:
    def __init__(self, config: ModelConfig, expert_dtype: ExpertDtype) -> None:
        self.c, self.expert_dtype = config, expert_dtype

    def ends(self) -> Iterator[TensorSpec]:
        c = self.c
        vocabulary = (c.vocab_size, c.hidden_size)
        yield TensorSpec("embed.weight", vocabulary, Stored.BF16, Role.EMBED)
        yield TensorSpec("head.weight", vocabulary, Stored.BF16, Role.HEAD, keep_fp32=True)
        yield TensorSpec("norm.weight", (c.hidden_size,), Stored.BF16, Role.HEAD, keep_fp32=True)
        yield from self._hc("hc_head", c.hc_mult, 1, Role.HEAD, None)

    def layer(self, p: str, layer: int) -> Iterator[TensorSpec]:
        c = self.c
        for norm in ("attn_norm", "ffn_norm"):
            yield self._norm(f"{p}.{norm}", c.hidden_size, layer)
        for site in ("hc_attn", "hc_ffn"):
            yield from self._hc(f"{p}.{site}", c.hc_mixes, 3, Role.ATTENTION, layer)
        yield from self._attention(f"{p}.attn", layer)
        if layer < c.num_hidden_layers and c.kind(layer) != "swa":
            yield from self._compressor(f"{p}.attn.compressor", c.head_dim, layer)
        if layer < c.num_hidden_layers and c.kind(layer) == "csa":
            yield from self._indexer(f"{p}.attn.indexer", layer)
        yield from self._gate(f"{p}.ffn.gate", layer)
        for expert in range(c.n_routed_experts):
            yield from self._expert(f"{p}.ffn.experts.{expert}", layer, expert)
        wide, narrow = c.moe_intermediate_size, c.hidden_size
        for name, shape in (("w1", (wide, narrow)), ("w2", (narrow, wide)), ("w3", (wide, narrow))):
            yield from self._fp8(f"{p}.ffn.shared_experts.{name}", shape, Role.SHARED, layer)

    def mtp(self, p: str, layer: int) -> Iterator[TensorSpec]:
        size = self.c.hidden_size
        for name in ("e_proj", "h_proj"):
            yield from self._fp8(f"{p}.{name}", (size, size), Role.ATTENTION, layer)
        for name in ("enorm", "hnorm", "norm"):
            yield self._norm(f"{p}.{name}", size, layer)
        yield from self._hc(f"{p}.hc_head", self.c.hc_mult, 1, Role.ATTENTION, layer)

    def _attention(self, p: str, layer: int) -> Iterator[TensorSpec]:
        c = self.c
        heads = c.num_attention_heads * c.head_dim
        for name, shape in (
            ("wq_a", (c.q_lora_rank, c.hidden_size)),
            ("wq_b", (heads, c.q_lora_rank)),
            ("wkv", (c.head_dim, c.hidden_size)),
            ("wo_a", (c.o_groups * c.o_lora_rank, heads // c.o_groups)),
            ("wo_b", (c.hidden_size, c.o_groups * c.o_lora_rank)),
        ):
            yield from self._fp8(f"{p}.{name}", shape, Role.ATTENTION, layer)
        yield self._norm(f"{p}.q_norm", c.q_lora_rank, layer)
        yield self._norm(f"{p}.kv_norm", c.head_dim, layer)
        yield self._f32(f"{p}.attn_sink", (c.num_attention_heads,), Role.ATTENTION, layer)

    def _compressor(self, p: str, dim: int, layer: int) -> Iterator[TensorSpec]:
        ratio = self.c.ratio(layer)
        width = dim * (2 if ratio == 4 else 1)
        yield self._f32(f"{p}.ape", (ratio, width), Role.ATTENTION, layer)
        for name in ("wkv", "wgate"):
            yield TensorSpec(
                f"{p}.{name}.weight",
                (width, self.c.hidden_size),
                Stored.BF16,
                Role.ATTENTION,
                layer,
                keep_fp32=True,
            )
        yield self._norm(f"{p}.norm", dim, layer)

    def _indexer(self, p: str, layer: int) -> Iterator[TensorSpec]:
        c = self.c
        shape = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield from self._fp8(f"{p}.wq_b", shape, Role.ATTENTION, layer)
        proj = (c.index_n_heads, c.hidden_size)
        yield TensorSpec(f"{p}.weights_proj.weight", proj, Stored.BF16, Role.ATTENTION, layer)
        yield from self._compressor(f"{p}.compressor", c.index_head_dim, layer)

    def _gate(self, p: str, layer: int) -> Iterator[TensorSpec]:
        c = self.c
        shape = (c.n_routed_experts, c.hidden_size)
        yield TensorSpec(f"{p}.weight", shape, Stored.BF16, Role.ROUTER, layer, keep_fp32=True)
        if c.is_hash(layer):
            table = (c.vocab_size, c.num_experts_per_tok)
            yield TensorSpec(f"{p}.tid2eid", table, Stored.I64, Role.ROUTER, layer)
        else:
            yield self._f32(f"{p}.bias", (c.n_routed_experts,), Role.ROUTER, layer)

    def _expert(self, p: str, layer: int, expert: int) -> Iterator[TensorSpec]:
        wide, narrow = self.c.moe_intermediate_size, self.c.hidden_size
        for name, (rows, cols) in (
            ("w1", (wide, narrow)),
            ("w2", (narrow, wide)),
            ("w3", (wide, narrow)),
        ):
            if self.expert_dtype == "fp8":
                yield from self._fp8(f"{p}.{name}", (rows, cols), Role.EXPERT, layer, expert)
                continue
            scale = f"{p}.{name}.scale"
            packed = (rows, cols // 2)
            yield TensorSpec(
                f"{p}.{name}.weight", packed, Stored.FP4, Role.EXPERT, layer, expert, scale
            )
            grid = (rows, -(-cols // 32))
            yield TensorSpec(scale, grid, Stored.SCALE, Role.EXPERT, layer, expert)

    def _fp8(
        self, p: str, shape: tuple[int, int], role: Role, layer: int, expert: int | None = None
    ) -> Iterator[TensorSpec]:
        scale = f"{p}.scale"
        yield TensorSpec(f"{p}.weight", shape, Stored.FP8, role, layer, expert, scale)
        grid = (-(-shape[0] // 128), -(-shape[1] // 128))
        yield TensorSpec(scale, grid, Stored.SCALE, role, layer, expert)

    def _hc(
        self, p: str, outputs: int, scales: int, role: Role, layer: int | None
    ) -> Iterator[TensorSpec]:
        width = self.c.hc_mult * self.c.hidden_size
        for part, shape in (("fn", (outputs, width)), ("base", (outputs,)), ("scale", (scales,))):
            yield self._f32(f"{p}_{part}", shape, role, layer)

    def _norm(self, p: str, size: int, layer: int) -> TensorSpec:
        return TensorSpec(
            f"{p}.weight", (size,), Stored.BF16, Role.ATTENTION, layer, keep_fp32=True
        )

    def _f32(self, name: str, shape: tuple[int, ...], role: Role, layer: int | None) -> TensorSpec:
        return TensorSpec(name, shape, Stored.F32, role, layer, keep_fp32=True)
