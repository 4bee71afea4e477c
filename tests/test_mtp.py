from __future__ import annotations

import pytest
import torch
from configs_oracle import CONFIGS, SEEDS
from oracle_hf import Oracle, random_weights

from whalepod.model.shape import ModelConfig
from whalepod.model.whole import WholeModel


def tokens(name: str, length: int) -> list[int]:
    g = torch.Generator().manual_seed(SEEDS[name] + 1)
    return torch.randint(0, CONFIGS[name]["vocab_size"], (length,), generator=g).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_equal_a_block_of_transformers_modules(name: str) -> None:
    cfg, ids = CONFIGS[name], tokens(name, 150)
    weights = random_weights(cfg, SEEDS[name])
    ours = WholeModel(ModelConfig.from_dict(cfg), weights).mtp_logits(ids)
    assert ours.shape == (len(ids) - 1, cfg["vocab_size"])
    torch.testing.assert_close(ours, Oracle(cfg, weights).mtp_logits(ids), atol=1e-4, rtol=0)


def test_drafts_read_the_next_token_and_no_later_one() -> None:
    cfg, ids = CONFIGS["flash"], tokens("flash", 40)
    model = WholeModel(ModelConfig.from_dict(cfg), random_weights(cfg, SEEDS["flash"]))
    before = model.mtp_logits(ids)
    ids[30] = (ids[30] + 1) % cfg["vocab_size"]
    after = model.mtp_logits(ids)
    assert torch.equal(before[:29], after[:29])
    assert (before[29:] - after[29:]).abs().amax(-1).min() > 1e-3


def test_drafting_leaves_the_sequences_alone() -> None:
    cfg, ids = CONFIGS["mixed"], tokens("mixed", 60)
    model = WholeModel(ModelConfig.from_dict(cfg), random_weights(cfg, SEEDS["mixed"]))
    state = model.new_state(100)
    first = model.forward(state, ids[:20])
    drafts = model.mtp_logits(ids[:20])
    again = model.new_state(100)
    assert torch.equal(first, model.forward(again, ids[:20]))
    assert torch.equal(drafts, model.mtp_logits(ids[:20]))
    assert torch.equal(model.forward(state, ids[20:]), model.forward(again, ids[20:]))


def test_weights_without_a_block_make_no_drafter() -> None:
    cfg = CONFIGS["mixed"]
    weights = {n: t for n, t in random_weights(cfg).items() if not n.startswith("mtp.")}
    assert WholeModel(ModelConfig.from_dict(cfg), weights).mtp is None
