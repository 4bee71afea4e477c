"""Rows into messages for shards, and sums of what comes back: written out, and by every twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from twins import DEVICE, random, twin

from whalepod.engine.fixed_form import FixedForm
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
    wide = torch.full((len(some.shards), size + 128), 255, dtype=torch.uint8, device=DEVICE)
    return wide, form.split(wide[:, 64 : 64 + size], tokens, (tokens, k), (tokens, k))


def check(run: object, case: tuple[int, ...], kind: torch.dtype, first: int) -> None:
    some = given(*case)
    some = some._replace(x=some.x.to(kind))
    tokens, k, experts, _, replicas, width = case
    form = FixedForm(width, kind, k, len(some.shards))
    wide, (out, ids, bits, seals) = messages(some, form)
    seal = torch.tensor([3, 1, 4, 1], dtype=torch.int32, device=DEVICE)
    counts = torch.arange(experts, device=DEVICE)
    run(*some, first, out, ids, bits, seals, seal, counts)  # type: ignore[operator]
    for s, shard in enumerate(some.shards.tolist()):
        assert torch.equal(out[s], some.x)
        assert torch.equal(bits[s].contiguous().view(torch.float32), some.weights)
        for t in range(tokens):
            for i, expert in enumerate(some.experts[t].tolist()):
                holder = int(some.holders[expert, ((first + t) * k + i) % replicas])
                assert int(ids[s, t, i]) == (expert if holder == shard else -1)
    chosen = torch.bincount(some.experts.flatten().cpu(), minlength=experts)
    assert torch.equal(counts.cpu(), torch.arange(experts) + chosen)
    assert not tokens or (seals == seal).all()
    assert (wide[:, :64] == 255).all(), "nothing is written before"
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


class Answers:
    """What shards send back, in messages with other things behind, and the sums."""

    def __init__(self, case: tuple[int, ...], kind: torch.dtype) -> None:
        tokens, k, _, shards, _, width = case
        form = FixedForm(width, kind, k, shards)
        size, room = form.to_home(tokens, True), tokens * k
        wide = torch.zeros(shards, size + 64, dtype=torch.uint8, device=DEVICE)
        self.back, places, _ = form.split(wide[:, :size], room, (tokens * k, 1))
        self.back.copy_(random(shards, room, width))
        self.places, self.k = places.squeeze(-1), k
        self.places.fill_(-1)
        rows = []
        for pair, holder in enumerate(torch.randint(shards, (tokens * k,)).tolist()):
            place = int((self.places[holder] >= 0).sum())
            self.places[holder, pair] = place
            rows.append(self.back[holder, place].float())
        each = torch.stack(rows).view(tokens, k, width) if rows else torch.zeros(0, k, width)
        self.total = each[:, 0]
        for i in range(1, k):
            self.total = self.total + each[:, i]

    def add(self, run: object, room: int | None = None) -> tuple[Tensor, bool]:
        crowded = torch.zeros((), dtype=torch.int32, device=DEVICE)
        some = self.back[:, :room]
        return run(some, self.places, self.k, crowded), bool(crowded)  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_written_out(case: tuple[int, ...], kind: torch.dtype) -> None:
    some = Answers(case, kind)
    total, crowded = some.add(sum_of_shards.reference)
    assert torch.equal(total, some.total)
    assert not crowded


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_adds_to_the_same_bits(case: tuple[int, ...], kind: torch.dtype) -> None:
    some = Answers(case, kind)
    total, crowded = some.add(twin(sum_of_shards))
    assert torch.equal(total, some.total)
    assert not crowded


@pytest.mark.triton
@pytest.mark.parametrize("pick", [lambda kernel: kernel.reference, twin])
def test_what_had_no_room_is_told(pick: Callable[[object], object]) -> None:
    run, some = pick(sum_of_shards), Answers(CASES[2], torch.bfloat16)
    needed = int(some.places.max()) + 1
    assert some.add(run, needed)[1] is False
    assert some.add(run, needed - 1)[1] is True


@pytest.mark.triton
def test_no_rows() -> None:
    case = (0, 2, 8, 3, 1, 40)
    check(twin(hand_out), case, torch.float32, 0)
    assert Answers(case, torch.float32).add(twin(sum_of_shards))[0].shape == (0, 40)
