import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.kernels.select import select


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, 0.0, 0.0, 1.5, float("-inf")]), min_size=4, max_size=30),
    st.integers(1, 4),
)
def test_ties_go_to_the_first_and_order_is_by_place(row: list[float], count: int) -> None:
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    got = select(torch.tensor([row, row[::-1]]), count)
    assert got[0].tolist() == sorted(ranked)


@pytest.mark.parametrize("extra", [1, 7, 100])
def test_company_does_not_change_the_choice(extra: int) -> None:
    scores = torch.relu(torch.randn(5, 40, generator=torch.Generator().manual_seed(1)))
    padded = torch.cat([scores, torch.full((5, extra), float("-inf"))], dim=1)
    assert torch.equal(select(padded, 12), select(scores, 12))
