"""Window, compressed and heavily compressed attention, with a loss that teaches the indexer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.net.basic import Kind, Params, linear, rms_norm, rotate
from whalepod.model.shape import ModelConfig


def compress(
    x: Tensor, p: Params, prefix: str, ratio: int, turns: tuple[Tensor, Tensor], config: ModelConfig
) -> Tensor:
    """Pool every `ratio` tokens of `x` `[B, T, D]` into one entry, `[B, T // ratio, width]`.

    With ratio 4 a token's first half of channels feeds the next window's entry.
    """
    rows = F.linear(x, p[f"{prefix}.wkv.weight"]).unflatten(1, (-1, ratio))
    logits = F.linear(x, p[f"{prefix}.wgate.weight"]).unflatten(1, (-1, ratio))
    logits = logits + p[f"{prefix}.ape"]
    if ratio == 4:
        width = rows.shape[-1] // 2
        before = F.pad(rows[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
        rows = torch.cat([before, rows[..., width:]], dim=2)
        absent = F.pad(logits[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=float("-inf"))
        logits = torch.cat([absent, logits[..., width:]], dim=2)
    pooled = (torch.softmax(logits, dim=2) * rows).sum(2)
    entries = rms_norm(pooled, p[f"{prefix}.norm.weight"], config.rms_norm_eps)
    cos, sin = (part[::ratio][: entries.shape[1]] for part in turns)
    return rotate(entries, cos, sin)


def index_scores(
    x: Tensor,
    low: Tensor,
    p: Params,
    kind: Kind,
    turns: tuple[Tensor, Tensor],
    config: ModelConfig,
) -> Tensor:
    """Score every entry for every query, `[B, T, X]` fp32. Inputs are detached by the caller."""
    heads, width = config.index_n_heads, config.index_head_dim
    q = linear(low, p["attn.indexer.wq_b.weight"], kind.dtype).unflatten(-1, (heads, width))
    cos, sin = (part.unsqueeze(-2) for part in turns)
    q = rotate(q, cos, sin).to(kind.dtype)
    keys = compress(x, p, "attn.indexer.compressor", 4, turns, config).to(kind.dtype)
    gate = F.linear(x, p["attn.indexer.weights_proj.weight"]) * (width**-0.5 * heads**-0.5)
    total = torch.zeros((), device=x.device)
    for head in range(heads):
        raw = torch.bmm(q[:, :, head], keys.transpose(1, 2)).float()
        total = total + gate[:, :, head].unsqueeze(-1) * torch.relu(raw)
    return total


def visible_entries(tokens: int, entries: int, ratio: int, device: torch.device) -> Tensor:
    """Which entries a query may see: those whose window it closes or comes after, `[T, X]`."""
    closed = (torch.arange(tokens, device=device) + 1) // ratio
    return torch.arange(entries, device=device) < closed.unsqueeze(-1)


def choose(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """The best `topk` visible entries of each query as a mask `[B, T, X]`."""
    if scores.shape[-1] <= topk:
        return visible.expand_as(scores)
    best = scores.detach().masked_fill(~visible, float("-inf")).topk(topk, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & visible


def index_loss(scores: Tensor, seen: Tensor, attended: Tensor) -> Tensor:
    """KL(what the heads attend to among the chosen entries || softmax of the index scores).

    Args:
        scores: `[B, T, X]`. seen: the chosen entries. attended: `[B, T, X]`, detached, summed heads.
    """
    target = attended * seen
    mass = target.sum(-1, keepdim=True)
    counted = (seen.sum(-1) > 1) & (mass[..., 0] > 1e-6)
    target = target / mass.clamp_min(1e-9)
    log_index = F.log_softmax(scores.masked_fill(~seen, -1e9), dim=-1)
    kl = (target * (target.clamp_min(1e-9).log() - log_index)).sum(-1)
    return (kl * counted).sum() / counted.sum().clamp_min(1)


def attend(
    q: Tensor, kv: Tensor, entries: Tensor | None, seen: Tensor | None, sink: Tensor, window: int
) -> tuple[Tensor, Tensor | None]:
    """Window and compressed entries under one softmax with a sink.

    Args:
        q: `[B, T, H, D]`. kv: `[B, T, D]`. entries: `[B, X, D]`. seen: `[B or 1, T, X]`.
        sink: `[H]`. window: T must be a multiple of it.

    Returns:
        `[B, T, H, D]`, and the probability of each entry summed over heads `[B, T, X]` (detached).
    """
    b, t, h, d = q.shape
    blocks = t // window
    rows = (q * d**-0.5).view(b * blocks, window * h, d)
    own = kv.view(b, blocks, window, d)
    near = torch.cat([F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own], dim=2).flatten(0, 1)
    logits = torch.bmm(rows, near.transpose(1, 2)).float().view(b, blocks, window, h, 2 * window)
    at = torch.arange(window, device=q.device).view(-1, 1, 1)
    back = at + window - torch.arange(2 * window, device=q.device)
    real = torch.arange(2 * window, device=q.device) >= window
    first = torch.arange(blocks, device=q.device).view(-1, 1, 1, 1) == 0
    inside = (back >= 0) & (back < window) & (real | ~first)
    parts = [logits.masked_fill(~inside, float("-inf"))]
    if entries is not None and seen is not None:
        far = torch.bmm(rows.view(b, t * h, d), entries.transpose(1, 2)).float()
        far = far.view(b, blocks, window, h, -1)
        allowed = seen.view(-1, blocks, window, 1, entries.shape[1])
        parts.append(far.masked_fill(~allowed, float("-inf")))
    parts.append(sink.view(-1, 1).expand(b, blocks, window, h, 1))
    chances = torch.softmax(torch.cat(parts, dim=-1), dim=-1)
    out = torch.bmm(chances[..., : 2 * window].to(q.dtype).view(b * blocks, -1, 2 * window), near)
    if entries is None:
        return out.view(b, t, h, d), None
    weight = chances[..., 2 * window : -1]
    summed = weight.detach().sum(3).view(b, t, -1)
    out = out.view(b, t * h, d) + torch.bmm(weight.to(q.dtype).view(b, t * h, -1), entries)
    return out.view(b, t, h, d), summed


def attention(
    x: Tensor, p: Params, kind: Kind, turns: tuple[Tensor, Tensor], config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Attention of one layer, `[B, T, D]`, and the indexer's loss (0 where there is none)."""
    eps, heads = config.rms_norm_eps, config.num_attention_heads
    cos, sin = (part.unsqueeze(-2) for part in turns)
    low = rms_norm(linear(x, p["attn.wq_a.weight"], kind.dtype), p["attn.q_norm.weight"], eps)
    q = linear(low, p["attn.wq_b.weight"], kind.dtype).unflatten(-1, (heads, -1))
    q = rotate(rms_norm(q, None, eps), cos, sin).to(kind.dtype)
    kv = rms_norm(linear(x, p["attn.wkv.weight"], kind.dtype), p["attn.kv_norm.weight"], eps)
    kv = rotate(kv, *turns).to(kind.dtype)
    entries = seen = scores = None
    if kind.ratio:
        made = compress(x, p, "attn.compressor", kind.ratio, turns, config)
        entries = made.to(kind.dtype)
        seen = visible_entries(x.shape[1], entries.shape[1], kind.ratio, x.device).unsqueeze(0)
    if kind.ratio == 4:
        scores = index_scores(x.detach(), low.detach(), p, kind, turns, config)
        seen = seen.expand_as(scores) if kind.dense else choose(scores, seen, config.index_topk)
    out, attended = attend(q, kv, entries, seen, p["attn.attn_sink"], config.sliding_window)
    loss = x.new_zeros(()) if scores is None else index_loss(scores, seen, attended)
    out = rotate(out, cos, -sin).to(kind.dtype).flatten(2).unflatten(2, (config.o_groups, -1))
    wo_a = p["attn.wo_a.weight"].unflatten(0, (config.o_groups, -1)).to(kind.dtype)
    grouped = torch.einsum("btgi,gri->btgr", out, wo_a).flatten(2)
    return linear(grouped, p["attn.wo_b.weight"], kind.dtype), loss
