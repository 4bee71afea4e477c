"""transformers' DeepSeek-V4 as an oracle: official tensor names in, fp32 logits out.

Nothing here comes from the code under test. Names and shapes follow the released index.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    create_sliding_window_causal_mask,
)

Config = dict[str, Any]
Weights = dict[str, Tensor]


def block_shapes(cfg: Config, prefix: str, ratio: int, hashed: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer (or of the MTP block's inner layer) by official name."""
    d, heads, hd = cfg["hidden_size"], cfg["num_attention_heads"], cfg["head_dim"]
    mixes = (2 + cfg["hc_mult"]) * cfg["hc_mult"]
    width, groups, rank = cfg["moe_intermediate_size"], cfg["o_groups"], cfg["o_lora_rank"]
    out: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (d,),
        "ffn_norm.weight": (d,),
        "attn.wq_a.weight": (cfg["q_lora_rank"], d),
        "attn.wq_b.weight": (heads * hd, cfg["q_lora_rank"]),
        "attn.wkv.weight": (hd, d),
        "attn.wo_a.weight": (groups * rank, heads * hd // groups),
        "attn.wo_b.weight": (d, groups * rank),
        "attn.q_norm.weight": (cfg["q_lora_rank"],),
        "attn.kv_norm.weight": (hd,),
        "attn.attn_sink": (heads,),
        "ffn.gate.weight": (cfg["n_routed_experts"], d),
    }
    for site in ("hc_attn", "hc_ffn"):
        out |= {f"{site}_fn": (mixes, cfg["hc_mult"] * d), f"{site}_base": (mixes,)}
        out[f"{site}_scale"] = (3,)
    compressors = {"attn.compressor": hd} if ratio else {}
    if ratio == 4:
        inner = cfg["index_head_dim"]
        compressors["attn.indexer.compressor"] = inner
        out["attn.indexer.wq_b.weight"] = (cfg["index_n_heads"] * inner, cfg["q_lora_rank"])
        out["attn.indexer.weights_proj.weight"] = (cfg["index_n_heads"], d)
    for name, dim in compressors.items():
        wide = 2 * dim if ratio == 4 else dim
        out |= {f"{name}.wkv.weight": (wide, d), f"{name}.wgate.weight": (wide, d)}
        out |= {f"{name}.ape": (ratio, wide), f"{name}.norm.weight": (dim,)}
    if hashed:
        out["ffn.gate.tid2eid"] = (cfg["vocab_size"], cfg["num_experts_per_tok"])
    else:
        out["ffn.gate.bias"] = (cfg["n_routed_experts"],)
    for owner in ["shared_experts", *(f"experts.{e}" for e in range(cfg["n_routed_experts"]))]:
        out |= {f"ffn.{owner}.{w}.weight": (width, d) for w in ("w1", "w3")}
        out[f"ffn.{owner}.w2.weight"] = (d, width)
    return {f"{prefix}.{name}": shape for name, shape in out.items()}


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, `mtp.0.*` included where the config has it."""
    d, hc, layers = cfg["hidden_size"], cfg["hc_mult"], cfg["num_hidden_layers"]
    head = {"hc_head_fn": (hc, hc * d), "hc_head_base": (hc,), "hc_head_scale": (1,)}
    head["norm.weight"] = (d,)
    out: dict[str, tuple[int, ...]] = {
        "embed.weight": (cfg["vocab_size"], d),
        "head.weight": (cfg["vocab_size"], d),
        **head,
    }
    for i in range(layers):
        hashed = i < cfg["num_hash_layers"]
        out |= block_shapes(cfg, f"layers.{i}", cfg["compress_ratios"][i], hashed)
    if cfg["num_nextn_predict_layers"]:
        out |= block_shapes(cfg, "mtp.0", cfg["compress_ratios"][layers], False)
        out |= {f"mtp.0.{n}": s for n, s in head.items()}
        out |= {f"mtp.0.{n}.weight": (d,) for n in ("enorm", "hnorm")}
        out |= {f"mtp.0.{n}.weight": (d, d) for n in ("e_proj", "h_proj")}
    return out


def random_weights(cfg: Config, seed: int = 0) -> Weights:
    """Weights with which every term of the model matters.

    Matrices N(0, 1/fan_in), norms 1 +- 0.1, biases, sinks and position biases N(0, 0.5), scales 1,
    distinct experts in every row of a hash table.
    """
    g = torch.Generator().manual_seed(seed)
    experts, k = cfg["n_routed_experts"], cfg["num_experts_per_tok"]
    out = {}
    for name, shape in shapes(cfg).items():
        if name.endswith("tid2eid"):
            out[name] = torch.rand(shape[0], experts, generator=g).argsort(-1)[:, :k].contiguous()
        elif name.endswith("_scale"):
            out[name] = torch.ones(shape)
        elif name.endswith(("_base", ".ape", "attn_sink", "gate.bias")):
            out[name] = 0.5 * torch.randn(shape, generator=g)
        elif len(shape) == 1:
            out[name] = 1 + 0.1 * torch.randn(shape, generator=g)
        elif name == "embed.weight":
            out[name] = torch.randn(shape, generator=g)
        else:
            out[name] = torch.randn(shape, generator=g) / math.sqrt(shape[-1])
    return out


LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{s}_{p}": f"{s}_hc.{p}" for s in ("attn", "ffn") for p in ("fn", "base", "scale")},
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    **{
        f"attn.{ours}.{a}": f"self_attn.{theirs}.{b}"
        for ours, theirs in (
            ("compressor", "compressor"),
            ("indexer.compressor", "compressor.indexer"),
        )
        for a, b in (
            ("wkv.weight", "kv_proj.weight"),
            ("wgate.weight", "gate_proj.weight"),
            ("ape", "position_bias"),
            ("norm.weight", "kv_norm.weight"),
        )
    },
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}


def layer_state(weights: Weights, prefix: str) -> Weights:
    """One block's tensors under the names of a `DeepseekV4DecoderLayer`."""
    own = {
        n.removeprefix(f"{prefix}."): t for n, t in weights.items() if n.startswith(f"{prefix}.")
    }
    out = {LAYER_NAMES[n]: t for n, t in own.items() if n in LAYER_NAMES}
    experts = range(sum(n.startswith("ffn.experts.") and n.endswith("w2.weight") for n in own))
    up = [torch.cat([own[f"ffn.experts.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in experts]
    out["mlp.experts.gate_up_proj"] = torch.stack(up)
    down = [own[f"ffn.experts.{e}.w2.weight"] for e in experts]
    out["mlp.experts.down_proj"] = torch.stack(down)
    return out


def hub_config(cfg: Config) -> DeepseekV4Config:
    """transformers' own reading of the released keys.

    It reads `compress_ratios` of 0, 4 and 128 only. A model with one other ratio is passed with
    128 in its place and with that ratio as the rate of the heavily compressed layers.
    """
    keys = {k: v for k, v in cfg.items() if v is not None}
    other = set(cfg["compress_ratios"]) - {0, 4, 128}
    if other:
        (rate,) = other
        assert 128 not in cfg["compress_ratios"]
        keys["compress_ratios"] = [128 if r == rate else r for r in cfg["compress_ratios"]]
        keys["compress_rate_hca"] = rate
    return DeepseekV4Config(**keys, attn_implementation="eager", experts_implementation="eager")


class Oracle:
    """transformers' model with the given weights, strictly loaded, fp32 eager."""

    def __init__(self, cfg: Config, weights: Weights) -> None:
        self.cfg, self.weights, self.config = cfg, weights, hub_config(cfg)
        self.model = DeepseekV4ForCausalLM(self.config).float().eval()
        state = {
            "model.embed_tokens.weight": weights["embed.weight"],
            "lm_head.weight": weights["head.weight"],
            "model.norm.weight": weights["norm.weight"],
            **{f"model.hc_head.hc_{p}": weights[f"hc_head_{p}"] for p in ("fn", "base", "scale")},
        }
        for i in range(cfg["num_hidden_layers"]):
            layer = layer_state(weights, f"layers.{i}")
            state |= {f"model.layers.{i}.{n}": t for n, t in layer.items()}
        self.model.load_state_dict(state, strict=True)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """One shot, `[n, V]`."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    @torch.no_grad()
    def chunked(self, ids: list[int], sizes: list[int]) -> Tensor:
        """The same tokens in chunks of the given sizes over a cache, `[n, V]`."""
        cache, parts, at = DynamicCache(config=self.config), [], 0
        for size in sizes:
            chunk = torch.tensor([ids[at : at + size]])
            parts.append(self.model(chunk, past_key_values=cache, use_cache=True).logits[0])
            at += size
        return torch.cat(parts)

    @torch.no_grad()
    def greedy(self, ids: list[int], new: int) -> list[int]:
        """The `new` most likely next tokens, one after the other over a cache."""
        cache = DynamicCache(config=self.config)
        out = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
        made = [int(out[0, -1].argmax())]
        while len(made) < new:
            step = torch.tensor([made[-1:]])
            out = self.model(step, past_key_values=cache, use_cache=True).logits
            made.append(int(out[0, -1].argmax()))
        return made

    @torch.no_grad()
    def streams(self, ids: list[int]) -> Tensor:
        """What leaves the last layer, before `hc_head`: `[1, n, C, D]`."""
        kept: list[Tensor] = []
        hook = self.model.model.layers[-1].register_forward_hook(lambda *a: kept.append(a[2]))
        self.logits(ids)
        hook.remove()
        return kept[0]

    @torch.no_grad()
    def mtp_logits(self, ids: list[int]) -> Tensor:
        """Row i drafts token i + 2 from the streams at i and token i + 1, `[n - 1, V]`.

        transformers has no MTP block; this one is put together from its modules.
        """
        cfg, layers = self.cfg, self.cfg["num_hidden_layers"]
        assert cfg["compress_ratios"][layers] == 0
        one = hub_config(
            cfg | {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
        )
        block = DeepseekV4DecoderLayer(one, 0).float().eval()
        block.load_state_dict(layer_state(self.weights, "mtp.0"), strict=True)
        head = DeepseekV4HyperHead(one).float()
        w = {n.removeprefix("mtp.0."): t for n, t in self.weights.items() if n.startswith("mtp.")}
        head.load_state_dict({f"hc_{p}": w[f"hc_head_{p}"] for p in ("fn", "base", "scale")})

        def norm(x: Tensor, name: str) -> Tensor:
            module = DeepseekV4RMSNorm(cfg["hidden_size"], eps=cfg["rms_norm_eps"])
            module.load_state_dict({"weight": w[f"{name}.weight"]})
            return module(x)

        after = torch.tensor([ids[1:]])
        embedded = norm(self.model.model.embed_tokens(after), "enorm") @ w["e_proj.weight"].T
        carried = norm(self.streams(ids)[:, :-1], "hnorm") @ w["h_proj.weight"].T
        positions = torch.arange(len(ids) - 1)[None]
        rotary = self.model.model.rotary_emb(embedded, position_ids=positions, layer_type="main")
        mask = create_sliding_window_causal_mask(
            config=one,
            inputs_embeds=embedded,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        out = block(
            carried + embedded.unsqueeze(2),
            input_ids=after,
            position_embeddings={"main": rotary},
            position_ids=positions,
            attention_mask=mask,
        )
        return self.model.lm_head(norm(head(out), "norm"))[0]
