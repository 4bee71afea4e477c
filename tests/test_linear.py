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


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_bit_equal_for_every_number_of_rows(name: str) -> None:
    function, shape = KERNELS[name]
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(9))
    whole = function(x)
    for count in [*range(1, 34), 61]:
        for first in (0, 3):
            part = function(x[first : first + count].contiguous())
            assert torch.equal(part, whole[first : first + count]), (count, first)


@pytest.mark.parametrize("heads", [2, 8, 64])
def test_attention_does_not_see_padding(heads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 1, heads, 64, generator=generator)
    sink = torch.randn(heads, generator=generator)
    kv = torch.randn(3, 137, 64, generator=generator)
    seen = torch.rand(3, 1, 137, generator=generator) < 0.8
    alone = sink_attention(q, kv, seen, sink)
    for extra in (1, 30, 55, 200, 777):
        more = torch.cat([kv, torch.randn(3, extra, 64, generator=generator)], 1)
        mask = torch.cat([seen, torch.zeros(3, 1, extra, dtype=torch.bool)], 2)
        assert torch.equal(sink_attention(q, more, mask, sink), alone)


def test_attention_equals_the_sum_written_out() -> None:
    torch.manual_seed(0)
    q, kv, sink = torch.randn(1, 2, 3, 8), torch.randn(1, 200, 8), torch.randn(3)
    seen = torch.rand(1, 2, 200) < 0.5
    seen[0, 1] = False
    got = sink_attention(q, kv, seen, sink)
    for m in range(2):
        for h in range(3):
            z = (kv[0].double() @ q[0, m, h].double()) / 8**0.5
            e = torch.where(seen[0, m], z.exp(), 0.0)
            expected = (e @ kv[0].double()) / (e.sum() + sink[h].double().exp())
            torch.testing.assert_close(got[0, m, h], expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(got[0, 1], torch.zeros(3, 8))
