"""The whole network: parameters, one layer's graph, trunk, heads and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.net.attention import attention
from demo.net.basic import Kind, Params, linear, rms_norm
from demo.net.experts import feed_forward, routes
from demo.net.streams import hyper_head, hyper_post, hyper_pre
from whalepod.model.rope import frequencies
from whalepod.model.shape import ModelConfig

# mHC head projection, base, scale; final norm.
Ends = tuple[Tensor, Tensor, Tensor, Tensor]


def _attend(
    y: Tensor, p: Params, kind: Kind, turns: tuple[Tensor, Tensor], config: ModelConfig
) -> tuple[Tensor, Tensor]:
    y = rms_norm(y, p["attn_norm.weight"], config.rms_norm_eps)
    return attention(y, p, kind, turns, config)


def _feed(
    y: Tensor, ids: Tensor, p: Params, kind: Kind, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    y = rms_norm(y, p["ffn_norm.weight"], config.rms_norm_eps)
    weights = routes(y, ids, p, kind, config)
    load = (weights.detach() > 0).float().sum((0, 1))
    return feed_forward(y, weights, p, kind, config), load


@dataclass(frozen=True)
class Layer:
    """One layer's parameters by the graph that reads them, so that alike layers share graphs."""

    attention: Params
    experts: Params
    attention_site: tuple[Tensor, Tensor, Tensor]
    experts_site: tuple[Tensor, Tensor, Tensor]
    rest: Params

    @classmethod
    def of(cls, params: Params, prefix: str) -> Layer:
        """Take the parameters whose names start with `prefix`."""
        own = {n.removeprefix(prefix): t for n, t in params.items() if n.startswith(prefix)}

        def site(name: str) -> tuple[Tensor, Tensor, Tensor]:
            return own[f"{name}_fn"], own[f"{name}_base"], own[f"{name}_scale"]

        return cls(
            {n: t for n, t in own.items() if n.startswith("attn")},
            {n: t for n, t in own.items() if n.startswith("ffn")},
            site("hc_attn"),
            site("hc_ffn"),
            {
                n: t
                for n, t in own.items()
                if not n.startswith(("attn", "ffn", "hc_attn", "hc_ffn"))
            },
        )


class Graphs:
    """The functions a layer is made of, each compiled once per kind, or not at all."""

    def __init__(self, compiled: bool) -> None:
        def wrap(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

        self.pre, self.post, self.head_loss = wrap(hyper_pre), wrap(hyper_post), wrap(_head_loss)
        self.attend, self.feed = wrap(_attend), wrap(_feed)

    def layer(
        self,
        x: Tensor,
        ids: Tensor,
        layer: Layer,
        turns: tuple[Tensor, Tensor],
        kind: Kind,
        config: ModelConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer: streams `[B, T, C, D]`, tokens per expert `[E]`, the indexer's loss."""
        y, post, comb = self.pre(x, *layer.attention_site, config)
        out, loss = self.attend(
            y, layer.attention, replace(kind, hashed=False, quantise=False), turns, config
        )
        x = self.post(out, x, post, comb)
        y, post, comb = self.pre(x, *layer.experts_site, config)
        out, load = self.feed(y, ids, layer.experts, replace(kind, ratio=0, dense=False), config)
        return self.post(out, x, post, comb), load, loss


@dataclass(frozen=True)
class Losses:
    """What one forward pass yields: means in nats, and what the router did.

    `load` is `[layers + 1, E]` tokens per expert; `right` the share of positions at which the
    MTP block's greedy draft is the main model's greedy token; `best` the latter, `[B, T]`.
    """

    lm: Tensor
    mtp: Tensor
    index: Tensor
    load: Tensor
    right: Tensor
    per_token: Tensor
    best: Tensor


class Net:
    """Parameters and the forward pass.

    Args:
        config: the model. params: by name, see `demo.net.parameters`. dtype: of the products.
        compiled: use `torch.compile`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        self.config, self.params, self.dtype = config, params, dtype
        self.dense = self.quantise = False
        self._graphs = Graphs(compiled)
        prefixes = [f"layers.{i}." for i in config.layers] + ["mtp.0."]
        self._layers = [Layer.of(params, prefix) for prefix in prefixes]
        self._turns: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def _kind(self, layer: int) -> Kind:
        c = self.config
        ratio = c.ratio(layer)
        dense = self.dense and ratio == 4
        return Kind(ratio, c.is_hash(layer), dense, self.dtype, self.quantise)

    def _rotations(self, tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        if tokens not in self._turns:
            at = torch.arange(tokens, dtype=torch.float32)
            angles = [
                torch.outer(at, frequencies(self.config, i)) for i in range(len(self._layers))
            ]
            self._turns[tokens] = [(a.cos().to(device), a.sin().to(device)) for a in angles]
        return self._turns[tokens]

    def trunk(self, ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Embeddings `[B, T, D]`, streams after the last layer, loads and indexer losses by layer."""
        embedded = F.embedding(ids, self.params["embed.weight"])
        x = embedded.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()
        turns, loads, losses = self._rotations(ids.shape[1], ids.device), [], []
        for i in self.config.layers:
            x, load, loss = self._graphs.layer(
                x, ids, self._layers[i], turns[i], self._kind(i), self.config
            )
            loads.append(load)
            losses.append(loss)
        return embedded, x, loads, losses

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of the main model, `[B, T, V]` fp32; T is a multiple of the window."""
        x = _collapse(self.trunk(ids)[1], self._ends(""), self.config)
        return linear(x, self.params["head.weight"], self.dtype).float()

    def draft_logits(self, ids: Tensor) -> Tensor:
        """Logits of the MTP block, `[B, T, V]`; row t drafts token t + 2, the last row nothing."""
        embedded, x, _, _ = self.trunk(ids)
        z = _collapse(self.draft_streams(ids, embedded, x)[0], self._ends("mtp.0."), self.config)
        return linear(z, self.params["head.weight"], self.dtype).float()

    def _ends(self, prefix: str) -> Ends:
        names = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")
        fn, base, scale, norm = (self.params[f"{prefix}{name}"] for name in names)
        return fn, base, scale, norm

    def draft_streams(self, ids: Tensor, embedded: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Streams after the MTP block; row t holds position t and the embedding of token t + 1."""
        p, eps, last = self._layers[-1].rest, self.config.rms_norm_eps, len(self._layers) - 1
        after = torch.cat([embedded[:, 1:], embedded[:, -1:]], dim=1)
        e = linear(rms_norm(after, p["enorm.weight"], eps), p["e_proj.weight"], self.dtype)
        h = linear(rms_norm(x, p["hnorm.weight"], eps), p["h_proj.weight"], self.dtype)
        z = h.float() + e.float().unsqueeze(2)
        turns = self._rotations(ids.shape[1], ids.device)[last]
        z, load, _ = self._graphs.layer(
            z, ids, self._layers[-1], turns, self._kind(last), self.config
        )
        return z, load

    def losses(self, tokens: Tensor, weight: Tensor) -> Losses:
        """Losses on whole sequences.

        Args:
            tokens: `[B, T + 1]` int64. weight: `[B, T]`, of the prediction of tokens 1 to T.
        """
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        embedded, x, loads, index = self.trunk(ids)
        head = self.params["head.weight"]
        lm, per_token, best = self._graphs.head_loss(
            x, targets, weight, self._ends(""), head, self.config, self.dtype
        )
        z, load = self.draft_streams(ids, embedded, x)
        # Row t drafts token t + 2; the last row has no next embedding.
        shifted = F.pad(targets[:, 1:], (0, 1))
        counted = F.pad(weight[:, 1:], (0, 1))
        mtp, _, draft = self._graphs.head_loss(
            z, shifted, counted, self._ends("mtp.0."), head, self.config, self.dtype
        )
        right = (draft[:, :-1] == best[:, 1:]).float().mean()
        losses = [loss for i, loss in enumerate(index) if self.config.ratio(i) == 4]
        return Losses(
            lm, mtp, torch.stack(losses).mean(), torch.stack([*loads, load]), right, per_token, best
        )


def _collapse(x: Tensor, ends: Ends, config: ModelConfig) -> Tensor:
    """Streams -> the head's input, `[B, T, D]`."""
    *site, norm = ends
    return rms_norm(hyper_head(x, *site, config), norm, config.rms_norm_eps)


def _head_loss(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    ends: Ends,
    head: Tensor,
    config: ModelConfig,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean cross-entropy, each token's, and the greedy tokens `[B, T]`."""
    logits = linear(_collapse(x, ends, config), head, dtype).float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view(targets.shape)
    mean = (each * weight).sum() / weight.sum().clamp_min(1e-6)
    return mean, each.detach(), logits.detach().argmax(-1)
