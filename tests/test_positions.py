"""Rotations, visible entries and pool rows of a pass, against plain Python and the references."""

from __future__ import annotations

import math

import pytest
import torch
from twins import DEVICE, poisoned, twin

from whalepod.kernels.positions import entries_seen, pool_rows, turns

PLACES = [0, 1, 2, 3, 4, 127, 128, 65_535, 2**20 - 1]


def test_references_are_plain_python() -> None:
    at = torch.tensor(PLACES)
    for ratio in (4, 128):
        assert entries_seen(at, ratio, 100).tolist() == [min(100, (p + 1) // ratio) for p in PLACES]
        first = turns(at, torch.tensor([1e-3]), ratio)[:, 0]
        angles = [p // ratio * ratio * 1e-3 for p in PLACES]
        assert first.tolist() == pytest.approx(
            [complex(math.cos(a), math.sin(a)) for a in angles], abs=1e-4
        )
    table = torch.tensor([[5, 0, 9], [7, 3, 1]], dtype=torch.int32)
    order = torch.tensor([[0, 31, 32, 95], [64, 1, 0, 63]])
    rows = pool_rows(order, table, torch.tensor([1, 0], dtype=torch.int32), 32)
    assert rows.tolist() == [[224, 255, 96, 63], [288, 161, 160, 31]]


@pytest.mark.triton
@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize("pairs", [1, 5, 32])
def test_rotations_equal_the_reference(pairs: int, ratio: int) -> None:
    at, freqs = torch.tensor(PLACES), torch.logspace(0, -5, pairs)
    with poisoned():
        made = twin(turns)(at.to(DEVICE), freqs.to(DEVICE), ratio).cpu()
    angles = ((at // ratio * ratio).float()[:, None] * freqs).double()
    truth = torch.polar(torch.ones_like(angles), angles)
    assert float((made.to(torch.complex128) - truth).abs().max()) < 2e-7
    assert twin(turns)(at[:0].to(DEVICE), freqs.to(DEVICE), ratio).shape == (0, pairs)


@pytest.mark.triton
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257])
def test_visible_entries_and_rows_equal_the_reference(count: int) -> None:
    at = torch.randint(0, 2**20, (count,), device=DEVICE)
    with poisoned():
        seen = twin(entries_seen)(at, 4, 1000)
    assert torch.equal(seen, entries_seen.reference(at, 4, 1000))
    table = torch.randperm(30, device=DEVICE).view(3, 10).int()
    order = torch.randint(0, 320, (3, count), device=DEVICE)
    own = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    with poisoned():
        rows = twin(pool_rows)(order, table, own, 32)
    assert torch.equal(rows, pool_rows.reference(order, table, own, 32))
