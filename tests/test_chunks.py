"""How a prompt is cut into chunks leaves no trace: on CPU in fp32 not one bit changes."""

from __future__ import annotations

from random import Random

import pytest
import torch
from configs_oracle import CONFIGS, SEEDS
from oracle_hf import random_weights
from test_mtp import tokens

from whalepod.model.shape import ModelConfig
from whalepod.model.whole import WholeModel


def cuts(kind: str, length: int) -> list[int]:
    """Chunk lengths that add up to `length`."""
    if kind == "ones":
        return [1] * length
    rng, found = Random(kind), []
    while sum(found) < length:
        found.append(min(rng.choice((1, 2, 3, 7, 64, 127, 128, 129, 200)), length - sum(found)))
    return found


def logits(model: WholeModel, ids: list[int], chunks: list[int]) -> torch.Tensor:
    state, found, at = model.new_state(len(ids)), [], 0
    for count in chunks:
        found.append(model.forward(state, ids[at : at + count]))
        at += count
    model.release(state)
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_any_cut_gives_the_same_bits(name: str) -> None:
    cfg, length = CONFIGS[name], 420
    ids = tokens(name, length)
    model = WholeModel(ModelConfig.from_dict(cfg), random_weights(cfg, SEEDS[name]))
    whole = logits(model, ids, [length])
    for kind in ("ones", "a", "b", "c"):
        found = logits(model, ids, cuts(kind, length))
        assert torch.equal(found, whole), (kind, (found - whole).abs().amax(-1).nonzero()[0])
