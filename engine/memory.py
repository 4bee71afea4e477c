"""What an attention member's memory holds, and how much KV fits into a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from whalepod.config import Config
from whalepod.errors import ConfigError
from whalepod.model.cache import Cache, Format
from whalepod.model.names import Role, Stored, TensorSpec, tensor_specs
from whalepod.model.shape import ModelConfig

_MIB = 1 << 20
_SIDE = {Role.ATTENTION, Role.SHARED, Role.EMBED, Role.HEAD}


def kv_format(config: Config, model: ModelConfig) -> Format:
    """How entries are stored: as released where that loses nothing, unless the configuration says.

    Raises:
        ConfigError: the released format is wanted for entries of other sizes.
    """
    wanted = config.engine.kv_format
    sizes = (model.head_dim % 64, model.qk_rope_head_dim, model.index_head_dim)
    if wanted == "released" and sizes != (0, 64, 128):
        raise ConfigError(
            f"engine.kv_format=released with head_dim {model.head_dim}, qk_rope_head_dim "
            f"{model.qk_rope_head_dim} and index_head_dim {model.index_head_dim}: it is made for a "
            "multiple of 64, for 64 and for 128; use plain"
        )
    if wanted != "auto" or sizes != (0, 64, 128):
        return "plain" if wanted == "auto" else wanted
    exact = config.model.fidelity == "released" and config.model.dtype == "bf16"
    return "released" if exact else "plain"


def weight_bytes(
    specs: Iterable[TensorSpec], model: ModelConfig, layers: range, itemsize: int, packed: bool
) -> int:
    """Bytes of the attention side's weights of some layers, as `Source.stage` keeps them."""
    total = 0
    for spec in specs:
        ends = {Role.EMBED: layers.start == 0, Role.HEAD: layers.stop == model.num_hidden_layers}
        here = spec.layer in layers if spec.layer is not None else ends.get(spec.role, False)
        if spec.role not in _SIDE or spec.stored is Stored.SCALE or not here:
            continue
        kept = 4 if spec.keep_fp32 else itemsize
        if packed and spec.stored is Stored.FP8:
            kept = 1
        elif packed and spec.stored is Stored.BF16 and len(spec.shape) == 2:
            kept = itemsize
        total += math.prod(spec.shape) * kept
    return total


def activation_bytes(model: ModelConfig, rows: int, itemsize: int) -> int:
    """Estimate of what a pass of `rows` needs besides: the widest moment of a layer."""
    streams = 2 * model.hc_mult * model.hidden_size
    heads = 3 * model.num_attention_heads * model.head_dim
    routed = model.num_experts_per_tok * (model.hidden_size + 3 * model.moe_intermediate_size)
    return rows * itemsize * (streams + max(heads, routed))


def blocks_within(config: Config, model: ModelConfig, stages: Iterable[range], packed: bool) -> int:
    """Blocks of KV that every attention member has: as configured, or as its budget allows.

    All pipeline stages number blocks alike, so the one with the least room decides.

    Raises:
        ConfigError: the budget does not hold one block a request besides the weights.
    """
    engine, tokens = config.engine, 128
    if engine.memory_gib is None:
        return max(1, engine.kv_tokens // tokens)
    itemsize = 4 if config.model.dtype == "fp32" else 2
    found: list[int] = []
    for layers in stages:
        cache = meta_cache(config, model, layers, blocks=1)
        parts = cache.parts
        fixed = {
            "weights": weight_bytes(tensor_specs(model).values(), model, layers, itemsize, packed),
            "rings": parts["window rings"] + parts["compressor rows"],
            "activations": activation_bytes(model, engine.max_step_tokens, itemsize),
        }
        block = parts["main entries"] + parts["index entries"]
        free = int(engine.memory_gib * (1 << 30)) - sum(fixed.values())
        if free < block * engine.max_batch:
            told = ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in fixed.items())
            raise ConfigError(
                f"engine.memory_gib={engine.memory_gib} leaves {free / _MIB:.1f} MiB for KV on layers "
                f"{layers.start} to {layers.stop - 1} ({told}), expected at least "
                f"{block * engine.max_batch / _MIB:.1f} MiB, a block of {cache.block_tokens} tokens for "
                f"each of engine.max_batch={engine.max_batch} requests; raise the budget, or lower "
                "engine.max_batch, engine.prefix_snapshots or engine.max_step_tokens, or split the "
                "layers over more topology.stages"
            )
        # A stage without compressed layers has no blocks to count.
        found.append(free // block if block else 1 << 20)
    return min(found)


def meta_cache(config: Config, model: ModelConfig, layers: range, blocks: int) -> Cache:
    """A stage's cache without memory behind it."""
    return Cache(
        model,
        layers,
        slots=config.engine.max_batch + config.engine.prefix_snapshots,
        blocks=blocks,
        dtype=torch.float32 if config.model.dtype == "fp32" else torch.bfloat16,
        device="meta",
        format=kv_format(config, model),
    )


def memory_table(
    name: str, weights: int, cache: Cache, activations: int, budget_gib: float | None
) -> str:
    """What a member holds, part by part, for the log."""
    lines = [("weights", weights), *cache.parts.items(), ("activations, about", activations)]
    total = sum(size for _, size in lines)
    lines.append(("in all", total))
    if budget_gib is not None:
        lines.append(("free", int(budget_gib * (1 << 30)) - total))
    layers = [*cache.layers]
    tokens = cache.blocks * cache.block_tokens
    head = (
        f"{name}: layers {layers[0]} to {layers[-1]}, {cache.slots} sequence slots, {tokens:,} tokens "
        f"of KV in {cache.blocks:,} blocks ({cache.format} entries, {cache.token_bytes:,.1f} bytes a token)"
    )
    rows = [f"  {part:<20}{size / _MIB:>12,.1f} MiB" for part, size in lines]
    return "\n".join([head, *rows])
