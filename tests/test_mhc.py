"""mHC against plain Python: twenty Sinkhorn iterations hide mistakes that one to three show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from configs_oracle import BASE

from whalepod.model.mhc import HyperConnection, HyperHead, hc_post, hc_pre, sinkhorn
from whalepod.model.shape import ModelConfig

C, D, TOKENS = 4, 12, 5
Matrix = list[list[float]]


@dataclass(frozen=True)
class Order:
    """How the specification orders the steps; every other value is a mistake somebody has made."""

    softmax_over_rows: bool = True
    columns_first: bool = True
    eps_after_softmax: bool = True
    eps_in_sums: bool = True
    extra: int = 0


RIGHT = Order()
WRONG = {
    "rows first": Order(columns_first=False),
    "no eps after softmax": Order(eps_after_softmax=False),
    "no eps in the sums": Order(eps_in_sums=False),
    "one iteration more": Order(extra=1),
    "softmax over columns": Order(softmax_over_rows=False),
}


def transpose(m: Matrix) -> Matrix:
    return [list(row) for row in zip(*m, strict=True)]


def softmax_rows(m: Matrix) -> Matrix:
    out = []
    for row in m:
        powers = [math.exp(x - max(row)) for x in row]
        out.append([p / sum(powers) for p in powers])
    return out


def divide_rows(m: Matrix, eps: float) -> Matrix:
    return [[x / (sum(row) + eps) for x in row] for row in m]


def divide_columns(m: Matrix, eps: float) -> Matrix:
    return transpose(divide_rows(transpose(m), eps))


def plain_sinkhorn(m: Matrix, iters: int, eps: float, order: Order = RIGHT) -> Matrix:
    m = softmax_rows(m) if order.softmax_over_rows else transpose(softmax_rows(transpose(m)))
    m = [[x + eps * order.eps_after_softmax for x in row] for row in m]
    steps = [divide_columns, divide_rows] if order.columns_first else [divide_rows, divide_columns]
    m = steps[0](m, eps * order.eps_in_sums)
    for _ in range(iters - 1 + order.extra):
        m = steps[1](m, eps * order.eps_in_sums)
        m = steps[0](m, eps * order.eps_in_sums)
    return m


def config(iters: int = 20, eps: float = 1e-6) -> ModelConfig:
    return ModelConfig.from_dict(
        BASE | {"hidden_size": D, "hc_sinkhorn_iters": iters, "hc_eps": eps, "rms_norm_eps": 1e-2}
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def projection(x: torch.Tensor, fn: torch.Tensor) -> list[float]:
    """One token: every stream's values side by side, one RMS over all of them."""
    flat = [v for stream in x.tolist() for v in stream]
    rms = math.sqrt(sum(v * v for v in flat) / len(flat) + 1e-2)
    return [sum(a * b for a, b in zip(row, flat, strict=True)) / rms for row in fn.tolist()]


@pytest.mark.parametrize("iters", [1, 2, 3, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_sinkhorn_equals_plain_python(iters: int, eps: float) -> None:
    logits = 2 * random(7, C, C)
    wanted = torch.tensor([plain_sinkhorn(m, iters, eps) for m in logits.tolist()])
    torch.testing.assert_close(sinkhorn(logits, iters, eps), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("iters", [1, 2])
def test_known_mistakes_in_sinkhorn_would_show(how: str, iters: int) -> None:
    logits = 2 * random(7, C, C)
    wrong = torch.tensor([plain_sinkhorn(m, iters, 1e-2, WRONG[how]) for m in logits.tolist()])
    assert (sinkhorn(logits, iters, 1e-2) - wrong).abs().max() > 1e-3


def test_sinkhorn_ends_on_columns() -> None:
    mix = sinkhorn(3 * random(6, C, C), 2, 1e-6)
    torch.testing.assert_close(mix.sum(1), torch.ones(6, C), atol=1e-5, rtol=0)
    assert (mix.sum(2) - 1).abs().max() > 1e-2


def test_sinkhorn_bears_large_logits() -> None:
    logits = torch.tensor([[[300.0, -300, 0, 0]] * C])
    assert torch.isfinite(sinkhorn(logits, 20, 1e-6)).all()


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_pre_equals_plain_python(iters: int, eps: float) -> None:
    x, fn = random(TOKENS, C, D), random((2 + C) * C, C * D, seed=1) / 6
    base, scale = random((2 + C) * C, seed=2), torch.tensor([0.7, 1.3, -1.9])
    y, post, comb = hc_pre(x, fn, base, scale, config(iters, eps))
    for t in range(TOKENS):
        m, b = projection(x[t], fn), base.tolist()
        pre = [sigmoid(m[i] * 0.7 + b[i]) + eps for i in range(C)]
        into = [sum(pre[i] * x[t, i, d].item() for i in range(C)) for d in range(D)]
        out = [2 * sigmoid(m[C + i] * 1.3 + b[C + i]) for i in range(C)]
        at = [[2 * C + C * j + k for k in range(C)] for j in range(C)]
        logits = [[m[a] * -1.9 + b[a] for a in row] for row in at]
        assert y[t].tolist() == pytest.approx(into, abs=2e-5)
        assert post[t].tolist() == pytest.approx(out, abs=1e-5)
        mixed = plain_sinkhorn(logits, iters, eps)
        for got, want in zip(comb[t].tolist(), mixed, strict=True):
            assert got == pytest.approx(want, abs=1e-5)


def test_a_site_reads_its_own_parameters() -> None:
    weights = {
        "layers.3.hc_ffn_fn": random((2 + C) * C, C * D, seed=1),
        "layers.3.hc_ffn_base": random((2 + C) * C, seed=2),
        "layers.3.hc_ffn_scale": torch.tensor([0.7, 1.3, -1.9]),
    }
    site, x = HyperConnection(config(), weights, "layers.3.hc_ffn"), random(TOKENS, C, D)
    for got, want in zip(site.pre(x), hc_pre(x, *weights.values(), config()), strict=True):
        assert torch.equal(got, want)


def test_post_sums_over_the_first_index() -> None:
    f, x = random(TOKENS, D), random(TOKENS, C, D, seed=1)
    post, comb = random(TOKENS, C, seed=2), random(TOKENS, C, C, seed=3)
    made = hc_post(f, x, post, comb)
    for t in range(TOKENS):
        for k in range(C):
            for d in range(D):
                want = post[t, k].item() * f[t, d].item()
                want += sum(comb[t, j, k].item() * x[t, j, d].item() for j in range(C))
                assert made[t, k, d].item() == pytest.approx(want, abs=1e-5)


def test_head_equals_plain_python() -> None:
    x, fn, base = random(TOKENS, C, D), random(C, C * D, seed=1) / 6, random(C, seed=2)
    weights = {"hc_head_fn": fn, "hc_head_base": base, "hc_head_scale": torch.tensor([1.7])}
    made = HyperHead(config(eps=1e-1), weights, "hc_head")(x)
    for t in range(TOKENS):
        m = projection(x[t], fn)
        weight = [sigmoid(m[i] * 1.7 + base[i].item()) + 1e-1 for i in range(C)]
        want = [sum(weight[i] * x[t, i, d].item() for i in range(C)) for d in range(D)]
        assert made[t].tolist() == pytest.approx(want, abs=2e-5)


def test_bf16_streams_are_mixed_in_fp32_and_rounded_once() -> None:
    x, f = random(TOKENS, C, D).bfloat16(), random(TOKENS, D, seed=4).bfloat16()
    fn, base = random((2 + C) * C, C * D, seed=1) / 6, random((2 + C) * C, seed=2)
    narrow = hc_pre(x, fn, base, torch.ones(3), config())
    wide = hc_pre(x.float(), fn, base, torch.ones(3), config())
    assert torch.equal(narrow[0], wide[0].bfloat16())
    assert narrow[1].dtype == narrow[2].dtype == torch.float32
    made = hc_post(f, x, *narrow[1:])
    assert torch.equal(made, hc_post(f.float(), x.float(), *narrow[1:]).bfloat16())
