"""A second whole model, written for reading: one sequence, no cache, no batching.

It performs the activation roundings that the released weights were trained to tolerate, each of
which can be left out by name; with none it must equal transformers. It also keeps the smallest
margin by which a router or an indexer chose, so that tests can avoid coin tosses.

Legend: T tokens, C streams, D width, H heads, E compressed entries. All of it is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDINGS = (
    "attention_input",
    "low_rank_query",
    "window",
    "entries",
    "index_query",
    "index_entries",
    "attention_output",
    "expert_input",
    "expert_inner",
    "shared_input",
    "shared_inner",
    "mtp_input",
)


def e4m3_values() -> Tensor:
    """Every non-negative finite E4M3 number in the order of its code."""
    out = [m / 8 * 2.0**-6 for m in range(8)]
    out += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor(out[:-1])  # the last code is NaN


E4M3, E2M1 = e4m3_values(), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """Round `|x| <= grid[-1]` to the nearest number of the grid, ties to the even code."""
    size = x.abs()
    upper = torch.searchsorted(grid, size).clamp(max=len(grid) - 1)
    lower = (upper - 1).clamp(min=0)
    down, up = size - grid[lower], grid[upper] - size
    take_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    return torch.copysign(torch.where(take_upper, grid[upper], grid[lower]), x)


def rounded(x: Tensor, grid: Tensor, block: int, floor: float) -> Tensor:
    """Round in blocks of the last dim with the smallest power-of-two scale that fits."""
    parts = []
    for part in x.split(block, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp(min=floor)
        mantissa, exponent = torch.frexp(amax * (1 / float(grid[-1])))
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
        parts.append(nearest((part / scale).clamp(-grid[-1], grid[-1]), grid) * scale)
    return torch.cat(parts, dim=-1)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return out if weight is None else out * weight


def walsh(size: int) -> Tensor:
    """Entry (i, j) is the parity of the common bits of i and j, over sqrt(size)."""
    sign = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(sign, dtype=torch.float32) / math.sqrt(size)


class Reference:
    """The model of `cfg` and official-name `weights`; `roundings` says what is rounded."""

    def __init__(
        self, cfg: dict[str, Any], weights: dict[str, Tensor], roundings: Collection[str] = ()
    ) -> None:
        assert set(roundings) <= set(ROUNDINGS)
        self.cfg, self.w, self.roundings = cfg, weights, frozenset(roundings)
        self.eps, self.gate_margin, self.index_margin = cfg["rms_norm_eps"], math.inf, math.inf
        self.clamped = 0

    def logits(self, ids: list[int]) -> Tensor:
        """`[T, V]`."""
        y = norm(self.collapse(self.streams(ids), "hc_head"), self.w["norm.weight"], self.eps)
        return y @ self.w["head.weight"].T

    def mtp_logits(self, ids: list[int]) -> Tensor:
        """Row i drafts token i + 2, `[T - 1, V]`."""
        w, after = self.w, torch.tensor(ids[1:])
        e = norm(w["embed.weight"][after], w["mtp.0.enorm.weight"], self.eps)
        z = norm(self.streams(ids)[:-1], w["mtp.0.hnorm.weight"], self.eps)
        e, z = (self.fp8(x, "mtp_input") for x in (e, z))
        x = (e @ w["mtp.0.e_proj.weight"].T).unsqueeze(1) + z @ w["mtp.0.h_proj.weight"].T
        x = self.block(x, after, "mtp.0", self.cfg["num_hidden_layers"])
        y = norm(self.collapse(x, "mtp.0.hc_head"), w["mtp.0.norm.weight"], self.eps)
        return y @ w["head.weight"].T

    def streams(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor(ids)
        x = self.w["embed.weight"][tokens].unsqueeze(1).expand(-1, self.cfg["hc_mult"], -1)
        for layer in range(self.cfg["num_hidden_layers"]):
            x = self.block(x, tokens, f"layers.{layer}", layer)
        return x

    def block(self, x: Tensor, tokens: Tensor, name: str, layer: int) -> Tensor:
        for site in ("attn", "ffn"):
            y, post, comb = self.mix(x, f"{name}.hc_{site}")
            y = norm(y, self.w[f"{name}.{site}_norm.weight"], self.eps)
            if site == "attn":
                f = self.attention(y, f"{name}.attn", layer)
            else:
                f = self.ffn(y, tokens, f"{name}.ffn", layer)
            x = torch.einsum("tk,td->tkd", post, f) + torch.einsum("tjk,tjd->tkd", comb, x)
        return x

    def project(self, x: Tensor, name: str) -> Tensor:
        flat = x.flatten(1)
        return norm(flat, None, self.eps) @ self.w[f"{name}_fn"].T

    def mix(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        c, eps = self.cfg["hc_mult"], self.cfg["hc_eps"]
        scale, base = self.w[f"{name}_scale"], self.w[f"{name}_base"]
        pre, post, comb = self.project(x, name).split([c, c, c * c], dim=-1)
        pre = torch.sigmoid(pre * scale[0] + base[:c]) + eps
        post = 2 * torch.sigmoid(post * scale[1] + base[c : 2 * c])
        comb = (comb * scale[2] + base[2 * c :]).view(-1, c, c).softmax(-1) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.cfg["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return torch.einsum("tc,tcd->td", pre, x), post, comb

    def collapse(self, x: Tensor, name: str) -> Tensor:
        weight = self.project(x, name) * self.w[f"{name}_scale"] + self.w[f"{name}_base"]
        return torch.einsum("tc,tcd->td", torch.sigmoid(weight) + self.cfg["hc_eps"], x)

    def fp8(self, x: Tensor, where: str, block: int = 128) -> Tensor:
        return rounded(x, E4M3, block, 1e-4) if where in self.roundings else x

    def key(self, x: Tensor, where: str) -> Tensor:
        plain = x.shape[-1] - self.cfg["qk_rope_head_dim"]
        return torch.cat([self.fp8(x[..., :plain], where, 64), x[..., plain:]], dim=-1)

    def index(self, x: Tensor, where: str) -> Tensor:
        # Rotated on both sides whatever is rounded: the rotation cancels in the product.
        turned = x @ walsh(x.shape[-1])
        return rounded(turned, E2M1, 32, 6 * 2.0**-126) if where in self.roundings else turned

    def rope(self, x: Tensor, positions: Tensor, layer: int, sign: int = 1) -> Tensor:
        """Rotate adjacent pairs of the last dims of `[T, ..., D]`."""
        cfg, rd = self.cfg, self.cfg["qk_rope_head_dim"]
        ratio, yarn = cfg["compress_ratios"][layer], cfg["rope_scaling"]
        base = cfg["compress_rope_theta"] if ratio else cfg["rope_theta"]
        freqs = torch.tensor([base ** (-2 * i / rd) for i in range(rd // 2)])
        if ratio and yarn:
            length = yarn["original_max_position_embeddings"]
            low, high = (
                rd * math.log(length / (n * 2 * math.pi)) / (2 * math.log(base))
                for n in (yarn["beta_fast"], yarn["beta_slow"])
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), rd - 1)
            ramp = (torch.arange(rd // 2) - low) / max(high - low, 0.001)
            ramp = ramp.clamp(0, 1)
            freqs = freqs * (1 - ramp) + freqs / yarn["factor"] * ramp
        angle = sign * positions.float().unsqueeze(-1) * freqs
        angle = angle.view(len(positions), *[1] * (x.ndim - 2), rd // 2)
        a, b = x[..., -rd::2], x[..., -rd + 1 :: 2]
        turned = torch.stack(
            [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1
        )
        return torch.cat([x[..., :-rd], turned.flatten(-2)], dim=-1)

    def pool(self, x: Tensor, name: str, ratio: int, layer: int) -> Tensor:
        """Compressed entries `[E, D]`, normed and rotated, not rounded."""
        w, entries = self.w, len(x) // ratio
        value, gate = x @ w[f"{name}.wkv.weight"].T, x @ w[f"{name}.wgate.weight"].T
        gate = gate + w[f"{name}.ape"][torch.arange(len(x)) % ratio]
        width = value.shape[1] // 2 if ratio == 4 else value.shape[1]
        made = []
        for e in range(entries):
            own = slice(e * ratio, (e + 1) * ratio)
            v, g = value[own, -width:], gate[own, -width:]
            if ratio == 4 and e:
                before = slice((e - 1) * ratio, e * ratio)
                v = torch.cat([value[before, :width], v])
                g = torch.cat([gate[before, :width], g])
            made.append((g.softmax(0) * v).sum(0))
        out = torch.stack(made) if made else value.new_empty(0, width)
        out = norm(out, w[f"{name}.norm.weight"], self.eps)
        return self.rope(out, torch.arange(entries) * ratio, layer)

    def attention(self, x: Tensor, name: str, layer: int) -> Tensor:
        cfg, w, heads = self.cfg, self.w, self.cfg["num_attention_heads"]
        t, ratio = len(x), self.cfg["compress_ratios"][layer]
        at = torch.arange(t)
        low_in = self.fp8(x, "attention_input")
        low = norm(low_in @ w[f"{name}.wq_a.weight"].T, w[f"{name}.q_norm.weight"], self.eps)
        low = self.fp8(low, "low_rank_query")
        q = norm((low @ w[f"{name}.wq_b.weight"].T).view(t, heads, -1), None, self.eps)
        q = self.rope(q, at, layer)
        kv = norm(low_in @ w[f"{name}.wkv.weight"].T, w[f"{name}.kv_norm.weight"], self.eps)
        kv = self.key(self.rope(kv, at, layer), "window")
        age = at.unsqueeze(1) - at
        seen = (age >= 0) & (age < cfg["sliding_window"])
        if ratio:
            entries = self.pool(x, f"{name}.compressor", ratio, layer)
            kv = torch.cat([kv, self.key(entries, "entries")])
            visible = torch.arange(t // ratio) < ((at + 1) // ratio).unsqueeze(1)
            if ratio == 4:
                visible = self.pick(x, low, visible, f"{name}.indexer", layer)
            seen = torch.cat([seen, visible], dim=1)
        z = torch.einsum("thd,sd->ths", q, kv) / math.sqrt(cfg["head_dim"])
        z = z.masked_fill(~seen.unsqueeze(1), -math.inf)
        sink = w[f"{name}.attn_sink"].view(1, heads, 1).expand(t, -1, -1)
        p = torch.cat([z, sink], dim=-1).softmax(-1)[..., :-1]
        out = self.rope(torch.einsum("ths,sd->thd", p, kv), at, layer, sign=-1)
        groups = out.reshape(t, cfg["o_groups"], -1)
        wo_a = w[f"{name}.wo_a.weight"].view(cfg["o_groups"], cfg["o_lora_rank"], -1)
        inner = torch.einsum("tgk,grk->tgr", groups, wo_a).flatten(1)
        return self.fp8(inner, "attention_output") @ w[f"{name}.wo_b.weight"].T

    def pick(self, x: Tensor, low: Tensor, visible: Tensor, name: str, layer: int) -> Tensor:
        """Narrow `visible` `[T, E]` to the best `index_topk` of each row."""
        heads, k = self.cfg["index_n_heads"], self.cfg["index_topk"]
        at = torch.arange(len(x))
        q = (low @ self.w[f"{name}.wq_b.weight"].T).view(len(x), heads, -1)
        q = self.index(self.rope(q, at, layer), "index_query")
        keys = self.index(self.pool(x, f"{name}.compressor", 4, layer), "index_entries")
        gate = x @ self.w[f"{name}.weights_proj.weight"].T
        gate = gate / math.sqrt(self.cfg["index_head_dim"] * heads)
        score = torch.einsum("th,the->te", gate, torch.einsum("thd,ed->the", q, keys).relu())
        out = visible.clone()
        for row in (visible.sum(1) > k).nonzero().flatten().tolist():
            order = score[row].masked_fill(~visible[row], -math.inf).sort(descending=True)
            self.index_margin = min(self.index_margin, float(order.values[k - 1] - order.values[k]))
            out[row] = False
            out[row, order.indices[:k]] = True
        return out

    def ffn(self, x: Tensor, tokens: Tensor, name: str, layer: int) -> Tensor:
        cfg, w = self.cfg, self.w
        k = cfg["num_experts_per_tok"]
        scores = F.softplus(x @ w[f"{name}.gate.weight"].T).sqrt()
        if layer < cfg["num_hash_layers"]:
            chosen = w[f"{name}.gate.tid2eid"][tokens]
        else:
            order = (scores + w[f"{name}.gate.bias"]).sort(-1, descending=True)
            chosen = order.indices[:, :k]
            if k < cfg["n_routed_experts"]:
                gap = float((order.values[:, k - 1] - order.values[:, k]).min())
                self.gate_margin = min(self.gate_margin, gap)
        weight = scores.gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) * cfg["routed_scaling_factor"]
        wide = self.fp8(x, "expert_input")
        out = self.expert(self.fp8(x, "shared_input"), f"{name}.shared_experts", "shared_inner", 1)
        for slot in range(k):
            for expert in chosen[:, slot].unique().tolist():
                rows = (chosen[:, slot] == expert).nonzero().flatten()
                share = weight[rows, slot].unsqueeze(-1)
                made = self.expert(wide[rows], f"{name}.experts.{expert}", "expert_inner", share)
                out = out.index_add(0, rows, made)
        return out

    def expert(self, x: Tensor, name: str, inner: str, share: Tensor | int) -> Tensor:
        limit = self.cfg["swiglu_limit"]
        gate, up = (x @ self.w[f"{name}.{n}.weight"].T for n in ("w1", "w3"))
        self.clamped += int((gate > limit).sum() + (up.abs() > limit).sum())
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        made = gate * torch.sigmoid(gate) * up * share
        return self.fp8(made, inner) @ self.w[f"{name}.w2.weight"].T
