"""Routing and experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.net.basic import Kind, Params, linear
from whalepod.model.shape import ModelConfig


def fake_fp4(weight: Tensor) -> Tensor:
    """Round to E2M1 with one power-of-two scale per 32 inputs; gradients pass straight through."""
    groups = weight.detach().unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 6)))
    size = (groups / scale).abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    value = (torch.round(size / step) * step).clamp_max(6) * scale
    return weight + (torch.copysign(value, groups).flatten(-2) - weight.detach())


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU in fp32."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


def routes(x: Tensor, ids: Tensor, p: Params, kind: Kind, config: ModelConfig) -> Tensor:
    """Weight of every expert for every token, `[B, T, E]`; zero for those not chosen."""
    scores = torch.sqrt(F.softplus(F.linear(x, p["ffn.gate.weight"])))
    if kind.hashed:
        chosen = p["ffn.gate.tid2eid"][ids]
    else:
        biased = scores.detach() + p["ffn.gate.bias"]
        chosen = biased.topk(config.num_experts_per_tok, dim=-1).indices
    weight = scores.gather(-1, chosen)
    weight = weight * (config.routed_scaling_factor / weight.sum(-1, keepdim=True))
    return torch.zeros_like(scores).scatter(-1, chosen, weight)


def feed_forward(x: Tensor, weights: Tensor, p: Params, kind: Kind, config: ModelConfig) -> Tensor:
    """Routed experts (all are computed, the chosen ones count) plus the shared one, `[B, T, D]`."""
    w13, w2 = p["ffn.experts.w13"], p["ffn.experts.w2"]
    if kind.quantise:
        w13, w2 = fake_fp4(w13), fake_fp4(w2)
    hidden = linear(x, w13.flatten(0, 1), kind.dtype).unflatten(-1, (w13.shape[0], 2, -1))
    inner = swiglu(hidden[..., 0, :], hidden[..., 1, :], config.swiglu_limit)
    inner = (inner * weights.unsqueeze(-1)).flatten(-2)
    routed = linear(inner, w2.permute(1, 0, 2).flatten(1), kind.dtype)
    s = "ffn.shared_experts"
    gate, up = (linear(x, p[f"{s}.{w}.weight"], kind.dtype) for w in ("w1", "w3"))
    shared = linear(swiglu(gate, up, config.swiglu_limit), p[f"{s}.w2.weight"], kind.dtype)
    return routed.float() + shared.float()
