"""Compiled CPU twins equal their references in torch, and their rows do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from whalepod.kernels import compiled
from whalepod.kernels.experts import run_pairs
from whalepod.kernels.hyper import hyper_post, hyper_pre
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.registry import Kernel
from whalepod.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(not compiled.runs("cpu"), reason="numba is not installed")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(*shape: int) -> Tensor:
    """Values that bf16 holds exactly."""
    return random(*shape, seed=5).bfloat16().float()


def check(
    kernel: Kernel, rows: Sequence[Tensor | None], rest: Sequence[object], near: float = 2e-5
) -> None:
    """A twin equals its reference, and each row alone equals itself in company, bit for bit."""

    def run(function: Callable[..., Tensor | tuple[Tensor, ...]], part: slice) -> list[Tensor]:
        made = function(*(r if r is None else r[part] for r in rows), *rest)
        return [made] if isinstance(made, Tensor) else list(made)

    whole = run(kernel, slice(None))
    for got, want in zip(whole, run(kernel.reference, slice(None)), strict=True):
        torch.testing.assert_close(got, want, atol=near, rtol=near)
    total = whole[0].shape[0]
    for part in (*(slice(i, i + 1) for i in range(total)), slice(0, 0), slice(1, 4), slice(2, 9)):
        for got, want in zip(run(kernel, part), whole, strict=True):
            assert torch.equal(got, want[part]), part


def test_every_operation_has_its_twin() -> None:
    for kernel in (linear, grouped_linear, hyper_pre, hyper_post, run_pairs, swiglu):
        assert kernel.pick("cpu") is not kernel.reference, kernel.name


@pytest.mark.parametrize("make", [random, on_grid])
@pytest.mark.parametrize("size", [(1, 16), (16, 48), (24, 1024), (65, 100), (200, 7), (96, 256)])
def test_products(size: tuple[int, int], make: Callable[..., Tensor]) -> None:
    check(linear, [random(11, size[1], seed=1)], [make(*size)], 1e-4)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_grouped_products(groups: int) -> None:
    check(grouped_linear, [random(11, groups, 96, seed=1)], [random(groups, 40, 96)], 1e-4)


def test_a_matrix_changed_in_place_is_seen() -> None:
    weight, x = random(16, 16), random(3, 16, seed=1)
    linear(x, weight)
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight), x @ weight.t())


def test_columns_of_a_wider_tensor_are_taken_where_they_lie() -> None:
    wide, weight = random(5, 96), random(20, 32, seed=1)
    part = wide[:, 32:64]
    assert torch.equal(linear(part, weight), linear(part.contiguous(), weight))


def test_gradients_flow_through_the_reference() -> None:
    weight = random(16, 16).requires_grad_()
    linear(random(3, 16, seed=1), weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("width", [16, 48, 256])
@pytest.mark.parametrize("normed", [True, False])
def test_collapsing_the_streams(width: int, normed: bool) -> None:
    fn, base, scales = random(24, 4 * width) / 6, random(24, seed=2), random(24, seed=3)
    norm = random(width, seed=4) if normed else None
    x = random(13, 4, width, seed=1)
    check(hyper_pre, [x], [fn, base, scales, norm, 20, 1e-6, 1e-6], 1e-4)


@pytest.mark.parametrize("more", [True, False])
def test_spreading_a_blocks_output(more: bool) -> None:
    rows = [random(13, 48), random(13, 4, 48, seed=1), random(13, 4, seed=2)]
    rows += [random(13, 4, 4, seed=3), random(13, 48, seed=4) if more else None]
    check(hyper_post, rows, [])


@pytest.mark.parametrize("weighted", [True, False])
def test_activation(weighted: bool) -> None:
    x, weights = random(11, 96) * 8, random(11, seed=1)
    whole = swiglu(x, 10.0, weights if weighted else None)
    torch.testing.assert_close(whole, swiglu.reference(x, 10.0, weights if weighted else None))
    assert torch.equal(swiglu(x[3:4], 10.0, weights[3:4] if weighted else None), whole[3:4])
    assert swiglu(x[:0], 10.0).shape == (0, 48)


class Pair:
    def __init__(self, seed: int) -> None:
        self.w13, self.w2 = random(64, 48, seed=seed), random(48, 32, seed=seed + 1)
        self.kept: object = None


@pytest.mark.parametrize("share", [1, 2, 6])
def test_experts(share: int) -> None:
    table = {e: Pair(e) for e in (0, 3, 4, 9)}
    x, weights = random(80, 48, seed=20), random(80 * share, seed=21)
    which = torch.tensor([0, 3, 4, 9])[torch.arange(80 * share) * 7 % 11 % 4]
    whole = run_pairs(x, which, weights, share, table, 10.0)
    want = run_pairs.reference(x, which, weights, share, table, 10.0)
    torch.testing.assert_close(whole, want, atol=1e-3, rtol=1e-4)
    for m in (0, 1, 50, 79):
        pairs = slice(m * share, (m + 1) * share)
        alone = run_pairs(x[m : m + 1], which[pairs], weights[pairs], share, table, 10.0)
        assert torch.equal(alone, whole[pairs])
