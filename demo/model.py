"""The demo model's configuration and its hash tables."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.batches import Recipe, Source
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny import preset_config


def demo_config() -> dict[str, Any]:
    """`config.json`: the preset `tiny-flash` (every part of V4-Flash) with a larger vocabulary."""
    return {**preset_config("tiny-flash"), "vocab_size": 4096}


def hash_table(config: ModelConfig, folder: Path) -> Tensor:
    """Experts of each token id for hash layers, `[V, K]` int64, even by how often tokens occur.

    Tokens are dealt out from the most frequent down, each to the least loaded experts; equally
    loaded ones are chosen at random.
    """
    source = Source(folder)
    tokens, _ = source.batch(Recipe(256, 512), 1)
    count = np.bincount(tokens.flatten().numpy(), minlength=config.vocab_size)
    rng = Random(1)
    load = [0.0] * config.n_routed_experts
    table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
    for token in np.argsort(-count, kind="stable"):
        order = sorted(range(len(load)), key=lambda e: (load[e], rng.random()))
        for k, expert in enumerate(order[: config.num_experts_per_tok]):
            table[token, k] = expert
            load[expert] += count[token] + 1e-3
    return table
