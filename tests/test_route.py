"""Pairs sorted by expert: every twin gives the reference's order and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whalepod.kernels.route import Blocks, Route, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table(experts: int, held: list[int]) -> Tensor:
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[held] = torch.arange(len(held), dtype=torch.int32)
    return slots.to(DEVICE)


def check(got: Route, experts: Tensor, slots: Tensor, held: int, blocks: Blocks) -> None:
    flat = experts.flatten().tolist()
    inside = [0 <= e < slots.numel() for e in flat]
    slot = [int(slots[e]) if ok else -1 for e, ok in zip(flat, inside, strict=True)]
    used = int(got.used)
    assert used <= blocks.bound(len(flat), held)
    assert got.slots.shape == (blocks.bound(len(flat), held),)
    sizes = {s: blocks.crowd if slot.count(s) > blocks.most else blocks.rows for s in {*slot}}
    covered, crowded = [], []
    for b in range(used):
        start, stop = int(got.starts[b]), int(got.stops[b])
        pairs = got.order[start:stop].tolist()
        assert {slot[p] for p in pairs} == {int(got.slots[b])}
        assert 0 < stop - start <= sizes[slot[pairs[0]]]
        assert pairs == sorted(pairs)
        covered += list(range(start, stop))
        crowded.append(slot.count(slot[pairs[0]]) > blocks.most)
    assert sorted(covered) == list(range(len(flat)))
    assert sorted(got.order.tolist()) == list(range(len(flat)))
    assert used == sum(-(-slot.count(s) // size) for s, size in sizes.items())
    assert crowded == sorted(crowded, reverse=True), "the blocks of crowded experts come first"
    assert sum(crowded) <= blocks.bound_crowded(len(flat))


FOUR, TWO, MANY = Blocks(4), Blocks(2), Blocks(16)
CASES = [(0, 2, FOUR), (1, 6, MANY), (7, 3, TWO), (43, 3, FOUR), (86, 3, MANY)]
CASES += [(43, 3, Blocks(4, 8, 16)), (40, 6, Blocks(2, 30, 8)), (3, 3, Blocks(2, 4, 8))]


@pytest.mark.parametrize(("tokens", "k", "blocks"), CASES)
def test_the_reference_groups_by_expert(tokens: int, k: int, blocks: Blocks) -> None:
    experts = torch.randint(-1, 10, (tokens, k), device=DEVICE)
    slots = table(9, [8, 1, 2, 5])
    check(route.reference(experts, slots, 4, blocks), experts, slots, 4, blocks)


@pytest.mark.triton
@pytest.mark.parametrize(("tokens", "k", "blocks"), CASES)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_twin_gives_the_same(tokens: int, k: int, blocks: Blocks, kind: torch.dtype) -> None:
    experts = torch.randint(-1, 10, (tokens, k), device=DEVICE).to(kind)
    slots = table(9, [8, 1, 2, 5])
    got, want = route(experts, slots, 4, blocks), route.reference(experts, slots, 4, blocks)
    check(got, experts, slots, 4, blocks)
    used = int(want.used)
    assert torch.equal(got.order, want.order)
    for a, b in zip(got[1:4], want[1:4], strict=True):
        assert torch.equal(a[:used], b[:used])


@pytest.mark.triton
def test_many_pairs_are_counted_first() -> None:
    experts = torch.randint(0, 5, (1100, 2), device=DEVICE)  # more chunks than are counted at once
    slots = table(5, [0, 1, 2, 3, 4])
    got = route(experts, slots, 5, Blocks(64))
    check(got, experts, slots, 5, Blocks(64))
    assert torch.equal(got.order, route.reference(experts, slots, 5, Blocks(64)).order)
