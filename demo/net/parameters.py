"""Parameters by name: how they start, and their way to and from the released layout."""

from __future__ import annotations

import torch
from torch import Tensor

from demo.net.basic import Params
from whalepod.model.names import Role, Stored, TensorSpec, tensor_specs
from whalepod.model.shape import ModelConfig

_INIT_STD = 0.02


def specs_of(config: ModelConfig) -> list[TensorSpec]:
    """The released tensors but for the scales."""
    return [s for s in tensor_specs(config).values() if s.stored is not Stored.SCALE]


def logical_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Shape of the values; two FP4 values share a stored byte."""
    if spec.stored is Stored.FP4:
        return (spec.shape[0], spec.shape[1] * 2)
    return spec.shape


def start(config: ModelConfig, table: Tensor, seed: int) -> Params:
    """Random parameters in fp32.

    Args:
        table: `[V, K]` int64, the experts of each token id in hash layers.
    """
    generator = torch.Generator().manual_seed(seed)
    return stack({s.name: _initial(s, config, table, generator) for s in specs_of(config)}, config)


def _initial(spec: TensorSpec, config: ModelConfig, table: Tensor, rng: torch.Generator) -> Tensor:
    name, shape = spec.name, logical_shape(spec)
    if spec.stored is Stored.I64:
        return table.clone()
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("_scale"):
        return torch.full(shape, 0.5)
    if name.endswith(("_base", "attn_sink", ".ape", "gate.bias")):
        return torch.zeros(shape)
    return torch.randn(shape, generator=rng) * _INIT_STD


def _expert_prefixes(config: ModelConfig) -> list[str]:
    return [f"layers.{i}.ffn.experts" for i in config.layers] + ["mtp.0.ffn.experts"]


def stack(values: dict[str, Tensor], config: ModelConfig) -> Params:
    """Released names -> the network's: a layer's experts in two tensors."""
    rest = dict(values)
    stacked: Params = {}
    for prefix in _expert_prefixes(config):
        w13, w2 = [], []
        for expert in range(config.n_routed_experts):
            one = {w: rest.pop(f"{prefix}.{expert}.{w}.weight") for w in ("w1", "w2", "w3")}
            w13.append(torch.cat([one["w1"], one["w3"]]))
            w2.append(one["w2"])
        stacked[f"{prefix}.w13"], stacked[f"{prefix}.w2"] = torch.stack(w13), torch.stack(w2)
    return {**rest, **stacked}


def unstack(params: Params, config: ModelConfig) -> dict[str, Tensor]:
    """The network's names -> released names, as fp32 on the CPU."""
    values = {n: t.detach().cpu() for n, t in params.items()}
    for prefix in _expert_prefixes(config):
        w13, w2 = values.pop(f"{prefix}.w13"), values.pop(f"{prefix}.w2")
        for expert in range(config.n_routed_experts):
            gate, up = w13[expert].chunk(2)
            for w, tensor in (("w1", gate), ("w3", up), ("w2", w2[expert])):
                values[f"{prefix}.{expert}.{w}.weight"] = tensor.contiguous()
    return values


def trained(name: str) -> bool:
    """Whether gradients move it; the hash tables and the selection biases are set otherwise."""
    return not name.endswith(("tid2eid", "gate.bias"))


def counts(config: ModelConfig) -> dict[str, int]:
    """Parameters in all, in routed experts, and active for one token."""
    specs = specs_of(config)
    total = sum(s.parameters for s in specs)
    experts = sum(s.parameters for s in specs if s.role is Role.EXPERT)
    active = total - experts + experts * config.num_experts_per_tok // config.n_routed_experts
    return {"total": total, "experts": experts, "active": active}
