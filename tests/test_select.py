import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.kernels.jit import triton
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


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scored(rows: int, size: int, kind: str) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(size)
    x = torch.randn(rows, size, generator=g, device=DEVICE)
    if kind == "tied":
        x = (x * 2).round().relu() * torch.where(x < 0, -1.0, 1.0)
    if kind == "narrow":
        x = 1 + x * 1e-6
    if kind == "masked":
        x = x.masked_fill(torch.arange(size, device=DEVICE) >= size // 3, float("-inf"))
    return x


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("kind", ["plain", "tied", "narrow", "masked"])
@pytest.mark.parametrize(("size", "count"), [(64, 64), (255, 1), (700, 512), (8193, 512)])
def test_the_twin_picks_what_the_reference_picks(size: int, count: int, kind: str) -> None:
    scores = scored(2, size, kind)
    assert torch.equal(select(scores, count), select.reference(scores, count))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["plain", "tied", "narrow", "masked"])
@pytest.mark.parametrize("count", [512, 1024])
def test_long_rows_on_a_gpu(count: int, kind: str) -> None:
    scores = scored(3, 262_144, kind)
    assert torch.equal(select(scores, count), select.reference(scores, count))
