"""The hyper-connection twins against fp64; the references have tests/test_mhc.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from twins import DEVICE, GPU, error, poisoned, random, same, twin

from whalepod.kernels.combine import combine
from whalepod.kernels.hyper_connection import Site, hc_head, hc_post, hc_post_pre, hc_pre

pytestmark = pytest.mark.triton

C, ITERS, EPS = 4, 20, 1e-6
WIDTHS = [4096, 80] if GPU else [80]
COUNTS = [0, 1, 15, 16, 17, 1025] if GPU else [0, 1, 17]
KINDS = [torch.bfloat16, torch.float32]
LIMIT = {torch.bfloat16: 4e-3, torch.float32: 2e-5}


def site(width: int, outputs: int = 24) -> Site:
    fn = random(outputs, C * width, size=(C * width) ** -0.5)
    return Site(fn, random(outputs), random(outputs), ITERS, EPS, 1e-6)


def true_pre(x: Tensor, s: Site, norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """fp64, with the one rounding before the norm."""
    wide, flat = x.double(), x.double().flatten(1)
    rms = (flat.square().mean(-1, keepdim=True) + s.rms_eps).rsqrt()
    m = flat @ s.fn.double().t() * rms * s.scales.double() + s.base.double()
    gates = torch.sigmoid(m[:, : 2 * C])
    y = torch.einsum("tc,tcd->td", gates[:, :C] + s.eps, wide)
    if norm is not None:
        y = y.to(x.dtype).double()
        y = y * (y.square().mean(-1, keepdim=True) + s.rms_eps).rsqrt() * norm.double()
    if m.shape[1] == C:
        return y, gates, gates
    mix = torch.softmax(m[:, 2 * C :].unflatten(1, (C, C)), -1) + s.eps
    mix = mix / (mix.sum(1, keepdim=True) + s.eps)
    for _ in range(s.iters - 1):
        mix = mix / (mix.sum(2, keepdim=True) + s.eps)
        mix = mix / (mix.sum(1, keepdim=True) + s.eps)
    return y, 2 * gates[:, C:], mix


def true_post(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = torch.einsum("tjk,tjd->tkd", comb.double(), x.double())
    return post.double().unsqueeze(-1) * f.double().unsqueeze(1) + mixed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", COUNTS)
def test_post_and_pre_in_one_equal_fp64(tokens: int, width: int, kind: torch.dtype) -> None:
    x, f, s = random(tokens, C, width, kind=kind), random(tokens, width, kind=kind), site(width)
    post, comb, norm = random(tokens, C), random(tokens, C, C, size=0.5), random(width)
    with poisoned():
        out, *rest = twin(hc_post_pre)(f, x, post, comb, s, norm)
        alone = twin(hc_post)(f, x, post, comb)
        again = twin(hc_pre)(out, s, norm)
    limit = LIMIT[kind]
    if not tokens:
        assert out.shape == x.shape
        return
    for a, b in zip([out, *rest], [alone, *again], strict=True):
        assert error(a, b) < (1e-3 * limit if kind is torch.bfloat16 else limit)
    assert error(out, true_post(f, x, post, comb)) < limit
    y, *gates = rest
    assert y.dtype == out.dtype == kind
    wanted = true_pre(out, s, norm)
    assert error(y, wanted[0]) < limit
    for got, want in zip(gates, wanted[1:], strict=True):
        assert got.shape == want.shape
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_post_and_pre_in_one_add_two_outputs(kind: torch.dtype) -> None:
    """As layers meet: sums of routed experts in fp32, and what the shared one made."""
    tokens, width = COUNTS[-1], WIDTHS[0]
    x, f, more = random(tokens, C, width, kind=kind), random(tokens, width), random(tokens, width)
    more, s, norm = more.to(kind), site(width), random(width)
    post, comb = random(tokens, C), random(tokens, C, C, size=0.5)
    with poisoned():
        out, *rest = twin(hc_post_pre)(f, x, post, comb, s, norm, more)
        alone = twin(hc_post)(f, x, post, comb, more)
        again = twin(hc_pre)(alone, s, norm)
    assert torch.equal(out, alone)
    limit = LIMIT[kind]
    assert error(out, true_post((f + more).to(kind), x, post, comb)) < limit
    for a, b in zip(rest, again, strict=True):
        assert error(a, b) < (1e-3 * limit if kind is torch.bfloat16 else limit)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_an_output_are_added_up_in_their_order(kind: torch.dtype) -> None:
    tokens, width = COUNTS[-1], WIDTHS[0]
    x, parts, s = (
        random(tokens, C, width, kind=kind),
        random(tokens, 3, width, kind=kind),
        site(width),
    )
    more, post, comb = random(tokens, width, kind=kind), random(tokens, C), random(tokens, C, C)
    f = combine.reference(parts)
    for added in (more, None):
        with poisoned():
            got = twin(hc_post_pre)(parts, x, post, comb, s, None, added)
            want = twin(hc_post_pre)(f, x, post, comb, s, None, added)
        for a, b in zip(got, want, strict=True):
            assert same(a, b)
        spread = hc_post.reference(parts, x, post, comb, added)
        assert error(spread, hc_post.reference(f, x, post, comb, added)) == 0


@pytest.mark.parametrize("tokens", COUNTS[1:])
def test_head_and_pre_without_a_norm_equal_fp64(tokens: int) -> None:
    x = random(tokens, C, WIDTHS[-1], kind=torch.bfloat16)
    for kernel, s in ((hc_head, site(WIDTHS[-1], C)), (hc_pre, site(WIDTHS[-1]))):
        for norm in (None, random(WIDTHS[-1])):
            with poisoned():
                made = twin(kernel)(x, s, norm)
            y = made if kernel is hc_head else made[0]
            assert error(y, true_pre(x, s, norm)[0]) < 4e-3


def test_large_projections_bear_sinkhorn() -> None:
    x, s = random(2, C, WIDTHS[0], kind=torch.bfloat16), site(WIDTHS[0])
    s = dataclasses.replace(s, scales=100 * s.scales)
    _, _, comb = twin(hc_pre)(x, s)
    assert torch.isfinite(comb).all()
    assert (comb.sum(1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_does_not_depend_on_the_others(width: int) -> None:
    tokens = 1500 if GPU else 18
    x = random(tokens, C, width, kind=torch.bfloat16)
    f, s = random(tokens, width, kind=torch.bfloat16), site(width)
    post, comb, norm = random(tokens, C), random(tokens, C, C), random(width)
    together = twin(hc_post_pre)(f, x, post, comb, s, norm)
    for rows in [[0], [tokens - 1], [5, 1], list(range(1, 18))]:
        at = torch.tensor(rows, device=DEVICE)
        alone = twin(hc_post_pre)(f[at], x[at], post[at], comb[at], s, norm)
        for a, b in zip(alone, together, strict=True):
            assert same(a, b[at])


@pytest.mark.parametrize("place", [1, 6, 11])  # of a gate before, of one behind, of the matrix
def test_a_nan_stays_one(place: int) -> None:
    x, s, norm = random(5, C, WIDTHS[0], kind=torch.bfloat16), site(WIDTHS[0]), random(WIDTHS[0])
    s.base[place] = float("nan")
    wanted = hc_pre.reference(x, s, norm)
    assert sum(int(want.isnan().any()) for want in wanted) == 1
    for got, want in zip(twin(hc_pre)(x, s, norm), wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
