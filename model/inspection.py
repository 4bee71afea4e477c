"""Tables of a checkpoint's tensors, bytes and parameters by role."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from whalepod.model.checkpoint import Checkpoint
from whalepod.model.names import TensorSpec, tensor_specs
from whalepod.model.shape import ModelConfig


def inspect_checkpoint(folder: Path) -> str:
    """Open and verify a folder, then describe it. Raises what `Checkpoint.open` raises."""
    checkpoint = Checkpoint.open(folder)
    shards = len({e.file for e in checkpoint.entries.values()})
    lines = [f"{folder}: {shards} shard(s), every tensor verified"]
    if checkpoint.unexpected:
        lines.append(f"not of this model: {', '.join(checkpoint.unexpected[:5])}")
    return "\n".join([*lines, describe(checkpoint.config, checkpoint.specs.values())])


def inspect_config(path: Path) -> str:
    """Describe the checkpoint that a `config.json` calls for, without any weights."""
    config = ModelConfig.from_file(path)
    return describe(config, tensor_specs(config, config.expert_dtype or "fp4").values())


def describe(config: ModelConfig, specs: Iterable[TensorSpec]) -> str:
    """Sizes, then a table by role and stored type; ends with `total_bytes N tensors M`."""
    rows: dict[tuple[str, str], list[int]] = {}
    for spec in specs:
        mtp = spec.layer is not None and spec.layer >= config.num_hidden_layers
        role = f"{'mtp ' if mtp else ''}{spec.role.value}"
        row = rows.setdefault((role, spec.stored.value), [0, 0, 0])
        row[0] += 1
        row[1] += spec.nbytes
        row[2] += spec.parameters
    kinds = [config.kind(i) for i in config.layers]
    counts = " ".join(f"{kinds.count(k)} {k}" for k in ("swa", "csa", "hca"))
    lines = [
        f"{config.num_hidden_layers} layers ({counts}), hidden {config.hidden_size}, "
        f"{config.n_routed_experts} experts top {config.num_experts_per_tok}, "
        f"{config.num_hash_layers} hash layers, {config.num_nextn_predict_layers} MTP block(s)",
        f"{'role':22} {'stored':8} {'tensors':>9} {'bytes':>19} {'parameters':>19}",
    ]
    for (role, stored), (tensors, size, parameters) in sorted(rows.items()):
        lines.append(f"{role:22} {stored:8} {tensors:>9,} {size:>19,} {parameters:>19,}")
    total = [sum(row[i] for row in rows.values()) for i in range(3)]
    lines.append(f"{'all':22} {'':8} {total[0]:>9,} {total[1]:>19,} {total[2]:>19,}")
    lines.append(f"total_bytes {total[1]} tensors {total[0]}")
    return "\n".join(lines)
