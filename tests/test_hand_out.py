"""Rows into messages for shards, and sums of what comes back: written out, and by every twin."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from twins import DEVICE, random, twin

from whalepod.engine.fixed import FixedForm
from whalepod.kernels.hand_out import hand_out, sum_of_shards

# Tokens, experts a token, experts, shards, replicas, width.
CASES = [(1, 6, 16, 1, 1, 128), (3, 2, 8, 3, 1, 40), (17, 6, 32, 4, 2, 1032), (2, 3, 12, 5, 3, 64)]
KINDS = [torch.float32, torch.bfloat16]


class Given(NamedTuple):
    x: Tensor
    experts: Tensor
    weights: Tensor
    holders: Tensor
    shards: Tensor


def given(tokens: int, k: int, experts: int, shards: int, replicas: int, width: int) -> Given:
    chosen = torch.rand(tokens, experts).topk(k).indices.to(DEVICE)
    held = torch.stack([torch.randperm(shards)[:replicas] for _ in range(experts)]).to(DEVICE)
    order = torch.randperm(shards).to(DEVICE)
    return Given(random(tokens, width), chosen, random(tokens, k), held, order)


def messages(some: Given, form: FixedForm) -> tuple[Tensor, list[Tensor]]:
    """Poisoned messages, and their parts."""
    tokens, k = some.experts.shape
    size = form.to_shard(tokens)
    # Something stands before and behind in each message, as another home's rows do.
    wide = torch.full((len(some.shards), size + 96), 255, dtype=torch.uint8, device=DEVICE)
    return wide, form.split(wide[:, 32 : 32 + size], tokens, k, k)


def check(run: object, case: tuple[int, ...], kind: torch.dtype, first: int) -> None:
    some = given(*case)
    some = some._replace(x=some.x.to(kind))
    tokens, k, experts, _, replicas, width = case
    wide, (out, ids, bits, seal) = messages(some, FixedForm(width, kind, k))
    seal.fill_(7)
    counts = torch.arange(experts, device=DEVICE)
    run(*some, first, out, ids, bits, counts)  # type: ignore[operator]
    for s, shard in enumerate(some.shards.tolist()):
        assert torch.equal(out[s], some.x)
        assert torch.equal(bits[s].contiguous().view(torch.float32), some.weights)
        for t in range(tokens):
            for i, expert in enumerate(some.experts[t].tolist()):
                holder = int(some.holders[expert, ((first + t) * k + i) % replicas])
                assert int(ids[s, t, i]) == (expert if holder == shard else -1)
    chosen = torch.bincount(some.experts.flatten().cpu(), minlength=experts)
    assert torch.equal(counts.cpu(), torch.arange(experts) + chosen)
    assert (seal == 7).all()
    assert (wide[:, :32] == 255).all(), "nothing is written before"
    assert (wide[:, -64:] == 255).all(), "nor behind"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [0, 5])
def test_messages_written_out(case: tuple[int, ...], first: int) -> None:
    check(hand_out.reference, case, torch.float32, first)


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_writes_the_same_messages(case: tuple[int, ...], kind: torch.dtype) -> None:
    check(twin(hand_out), case, kind, 3)


def answers(case: tuple[int, ...], kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What shards send back, in messages with other things behind, and the sums."""
    tokens, k, experts, shards, _, width = case
    form = FixedForm(width, kind, k)
    size = form.to_home(tokens)
    wide = torch.zeros(shards, size + 32, dtype=torch.uint8, device=DEVICE)
    back, ids, _ = form.split(wide[:, :size], tokens * k, 1)
    back.copy_(random(shards, tokens * k, width))  # noise where the expert is elsewhere
    ids.fill_(-1)
    holder = torch.randint(shards, (tokens * k,)).to(DEVICE)
    pair = torch.arange(tokens * k, device=DEVICE)
    ids[holder, pair, 0] = torch.randint(experts, (tokens * k,), dtype=torch.int32).to(DEVICE)
    rows = back[holder, pair].float().view(tokens, k, width)
    total = rows[:, 0]
    for i in range(1, k):
        total = total + rows[:, i]
    return back, ids.squeeze(-1), total


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_written_out(case: tuple[int, ...], kind: torch.dtype) -> None:
    back, ids, total = answers(case, kind)
    assert torch.equal(sum_of_shards.reference(back, ids, case[1]), total)


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_adds_to_the_same_bits(case: tuple[int, ...], kind: torch.dtype) -> None:
    back, ids, total = answers(case, kind)
    assert torch.equal(twin(sum_of_shards)(back, ids, case[1]), total)  # type: ignore[operator]


@pytest.mark.triton
def test_no_rows() -> None:
    case = (0, 2, 8, 3, 1, 40)
    check(twin(hand_out), case, torch.float32, 0)
    back, ids, _ = answers(case, torch.float32)
    assert twin(sum_of_shards)(back, ids, 2).shape == (0, 40)  # type: ignore[operator]
