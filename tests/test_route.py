"""Pairs sorted by expert: every twin gives the reference's order and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whalepod.kernels.route import Route, most_blocks, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table(experts: int, held: list[int]) -> Tensor:
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[held] = torch.arange(len(held), dtype=torch.int32)
    return slots.to(DEVICE)


def check(got: Route, experts: Tensor, slots: Tensor, held: int, rows: int) -> None:
    flat = experts.flatten().tolist()
    inside = [0 <= e < slots.numel() for e in flat]
    slot = [int(slots[e]) if ok else -1 for e, ok in zip(flat, inside, strict=True)]
    used = int(got.used)
    assert used <= most_blocks(len(flat), held, rows)
    assert got.slots.shape == (most_blocks(len(flat), held, rows),)
    covered = []
    for b in range(used):
        start, stop = int(got.starts[b]), int(got.stops[b])
        assert 0 < stop - start <= rows
        pairs = got.order[start:stop].tolist()
        assert {slot[p] for p in pairs} == {int(got.slots[b])}
        assert pairs == sorted(pairs)
        covered += list(range(start, stop))
    assert covered == list(range(len(flat)))
    assert sorted(got.order.tolist()) == list(range(len(flat)))
    whole = sum(-(-slot.count(s) // rows) for s in {*slot})
    assert used == whole


CASES = [(0, 2, 4), (1, 6, 16), (7, 3, 2), (43, 3, 4), (86, 3, 16)]


@pytest.mark.parametrize(("tokens", "k", "rows"), CASES)
def test_the_reference_groups_by_expert(tokens: int, k: int, rows: int) -> None:
    experts = torch.randint(-1, 10, (tokens, k), device=DEVICE)
    slots = table(9, [8, 1, 2, 5])
    check(route.reference(experts, slots, 4, rows), experts, slots, 4, rows)


@pytest.mark.triton
@pytest.mark.parametrize(("tokens", "k", "rows"), CASES)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_twin_gives_the_same(tokens: int, k: int, rows: int, kind: torch.dtype) -> None:
    experts = torch.randint(-1, 10, (tokens, k), device=DEVICE).to(kind)
    slots = table(9, [8, 1, 2, 5])
    got, want = route(experts, slots, 4, rows), route.reference(experts, slots, 4, rows)
    check(got, experts, slots, 4, rows)
    used = int(want.used)
    assert torch.equal(got.order, want.order)
    for a, b in zip(got[1:4], want[1:4], strict=True):
        assert torch.equal(a[:used], b[:used])


@pytest.mark.triton
def test_many_pairs_are_counted_first() -> None:
    experts = torch.randint(0, 5, (1100, 2), device=DEVICE)  # more chunks than are counted at once
    slots = table(5, [0, 1, 2, 3, 4])
    got = route(experts, slots, 5, 64)
    check(got, experts, slots, 5, 64)
    assert torch.equal(got.order, route.reference(experts, slots, 5, 64).order)
