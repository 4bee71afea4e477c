"""A row's bits do not depend on its company."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whalepod.kernels.activation import sigmoid, sqrt_softplus
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.sink_attention import sink_attention
from whalepod.kernels.sinkhorn import sinkhorn
from whalepod.kernels.swiglu import swiglu

WEIGHTS = {
    (n, k): torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    for n, k in ((24, 1024), (256, 128), (5, 48), (1536, 128), (7, 7168))
}
GROUPS = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(1))
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    **{f"linear {n}x{k}": ((lambda x, w=w: linear(x, w)), (k,)) for (n, k), w in WEIGHTS.items()},
    "grouped_linear": (lambda x: grouped_linear(x, GROUPS), (4, 256)),
    "sinkhorn": (lambda x: sinkhorn(x, 20, 1e-6), (4, 4)),
    "sigmoid": (sigmoid, (8,)),
    "sqrt_softplus": (sqrt_softplus, (24,)),
    "swiglu": (lambda x: swiglu(x, 10.0), (80,)),
}


@pytest.mark.parametrize("way", ["chosen", "torch"])
@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_bit_equal_for_every_number_of_rows(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        for kernel in (linear, grouped_linear, sinkhorn, swiglu):
            monkeypatch.setitem(kernel._picked, "cpu", kernel.reference)
    function, shape = KERNELS[name]
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(9))
    whole = function(x)
    for count in [*range(1, 34), 61]:
        for first in (0, 3):
            part = function(x[first : first + count].contiguous())
            assert torch.equal(part, whole[first : first + count]), (count, first)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
WIDTH = 16


def inputs(heads: int, entries: int) -> Inputs:
    """Queries, a ring, entries and sinks of three sequences."""
    generator = torch.Generator().manual_seed(2)
    shapes = (3, 1, heads, 64), (3, WIDTH, 64), (3, entries, 64), (heads,)
    q, ring, listed, sink = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, ring, listed, sink


AT = torch.tensor([[4], [15], [0]]), torch.tensor([[2], [1], [0]])


@pytest.mark.parametrize("heads", [2, 8, 64])
def test_attention_does_not_see_padding(heads: int) -> None:
    q, ring, listed, sink = inputs(heads, 137)
    seen = torch.rand(3, 1, 137, generator=torch.Generator().manual_seed(3)) < 0.8
    alone = sink_attention(q, (ring, ring), *AT, (listed, seen), sink)
    for extra in (1, 30, 55, 200, 777):
        more = torch.cat([listed, torch.randn(3, extra, 64)], 1)
        mask = torch.cat([seen, torch.zeros(3, 1, extra, dtype=torch.bool)], 2)
        got = sink_attention(q, (ring, ring), *AT, (more, mask), sink)
        assert torch.equal(got, alone)
    for b in range(3):
        one = slice(b, b + 1)
        at = tuple(x[one] for x in AT)
        got = sink_attention(q[one], (ring[one],) * 2, *at, (listed[one], seen[one]), sink)
        assert torch.equal(got, alone[one])


@pytest.mark.parametrize("heads", [2, 4, 64])
def test_attention_has_one_form_for_shared_and_own_entries_and_for_laps(heads: int) -> None:
    q, ring, listed, sink = inputs(heads, 40)
    seen = torch.ones(3, 1, 40, dtype=torch.bool)
    alone = sink_attention(q, (ring, ring), *AT, (listed, seen), sink)
    own = sink_attention(q, (ring, ring), *AT, (listed.unsqueeze(1), seen), sink)
    assert torch.equal(own, alone)
    slot = AT[0][..., None]
    kept = torch.arange(WIDTH)[None, :, None] <= slot
    current = torch.where(kept, ring, torch.randn(ring.shape))
    previous = torch.where(kept, torch.randn(ring.shape), ring)
    assert torch.equal(sink_attention(q, (current, previous), *AT, (listed, seen), sink), alone)


def test_attention_equals_the_sum_written_out() -> None:
    q, ring, listed, sink = inputs(3, 200)
    seen = torch.rand(3, 1, 200, generator=torch.Generator().manual_seed(4)) < 0.5
    got = sink_attention(q, (ring, ring), *AT, (listed, seen), sink)
    for b in range(3):
        near = WIDTH if AT[1][b, 0] else int(AT[0][b, 0]) + 1
        keys = torch.cat([ring[b, :near], listed[b, seen[b, 0]]]).double()
        for h in range(3):
            e = ((keys @ q[b, 0, h].double()) / 8).exp()
            expected = (e @ keys) / (e.sum() + sink[h].double().exp())
            torch.testing.assert_close(got[b, 0, h], expected.float(), atol=1e-5, rtol=1e-5)
