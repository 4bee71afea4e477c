"""The training network computes what the engine computes, and everything in it learns."""

from __future__ import annotations

import pytest
import torch
from demo.net import parameters
from demo.net.attention import choose, index_loss
from demo.net.experts import fake_fp4
from demo.net.whole import Net
from demo.optimiser import Optimiser, orthogonal

from whalepod.model.checkpoint import Checkpoint
from whalepod.model.quant import decode_fp4, encode_fp4
from whalepod.model.tiny import make_tiny
from whalepod.model.whole import WholeModel

TOKENS = 384  # more compressed entries than index_topk, and two HCA windows
FEW = 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_tiny(tmp_path_factory.mktemp("net") / "flash", "tiny-flash"))


def ids(checkpoint: Checkpoint, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, checkpoint.config.vocab_size, (rows, tokens), generator=generator)


def net_of(checkpoint: Checkpoint) -> tuple[Net, dict[str, torch.Tensor]]:
    values = {n: t.clone() for n, t in checkpoint.everything().items()}
    params = parameters.stack(values, checkpoint.config)
    return Net(checkpoint.config, params, torch.float32), params


def test_logits_and_drafts_are_the_engines(checkpoint: Checkpoint) -> None:
    net, _ = net_of(checkpoint)
    whole = WholeModel(checkpoint.config, checkpoint.everything())
    row = ids(checkpoint, 1, TOKENS)
    theirs = whole.forward(whole.new_state(TOKENS), row[0].tolist())
    torch.testing.assert_close(net.logits(row)[0], theirs, atol=2e-4, rtol=0)
    drafts = whole.mtp_logits(row[0].tolist())
    torch.testing.assert_close(net.draft_logits(row)[0, :-1], drafts, atol=2e-4, rtol=0)


def test_names_go_there_and_back(checkpoint: Checkpoint) -> None:
    _, params = net_of(checkpoint)
    back = parameters.unstack(params, checkpoint.config)
    values = checkpoint.everything()
    assert back.keys() == values.keys()
    assert all(torch.equal(back[name], values[name]) for name in values)


@pytest.mark.slow
def test_every_parameter_learns(checkpoint: Checkpoint) -> None:
    net, params = net_of(checkpoint)
    moved = {n: t.requires_grad_(True) for n, t in params.items() if parameters.trained(n)}
    rows = ids(checkpoint, 1, FEW + 1)
    optimiser = Optimiser(params)
    first = None
    for _ in range(2):
        losses = net.losses(rows, torch.ones(1, FEW))
        total = losses.lm + 0.3 * losses.mtp + losses.index
        total.backward()
        if first is None:
            first = total.item()
            still = [n for n, t in moved.items() if t.grad is None or not t.grad.any()]
            assert still == []
        optimiser.step(2e-3)
    assert net.losses(rows, torch.ones(1, FEW)).lm.item() < first - 0.5
    assert losses.load.sum(1).tolist() == [FEW * 2] * 8


def test_fake_fp4_is_the_stored_format() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.03
    weight.requires_grad_(True)
    rounded = fake_fp4(weight)
    assert torch.equal(rounded.detach(), decode_fp4(*encode_fp4(weight.detach())))
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_indexers_loss_is_zero_when_it_agrees_and_not_otherwise() -> None:
    attended = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(1)) + 0.1
    seen = torch.ones(1, 5, 7, dtype=torch.bool)
    agreed = index_loss(attended.log() + 3, seen, attended)
    assert agreed.abs() < 1e-6
    assert index_loss(-attended.log(), seen, attended) > 0.05


def test_choice_sees_no_future_and_keeps_topk() -> None:
    scores = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(2))
    visible = torch.tril(torch.ones(6, 6, dtype=torch.bool)).unsqueeze(0)
    seen = choose(scores, visible, 2)
    assert not (seen & ~visible).any()
    assert seen.sum(-1).tolist() == [[1, 2, 2, 2, 2, 2]]


def test_muon_makes_singular_values_even() -> None:
    matrices = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.4
