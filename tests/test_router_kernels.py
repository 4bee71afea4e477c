"""The gate and the sum of expert outputs: twins against a plain computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whalepod.kernels import dense as launches
from whalepod.kernels.combine import combine
from whalepod.kernels.gate import gate

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
D, E, K, V, SCALE = 320, 24, 6, 40, 2.5
TWINS = [
    pytest.param(False, id="reference"),
    pytest.param(True, id="triton", marks=pytest.mark.triton),
]


def pick(kernel: Any, twin: bool) -> Callable[..., Any]:
    return kernel if twin else kernel.reference  # type: ignore[no-any-return]


def weight(kind: torch.dtype) -> Tensor:
    return (torch.randn(E, D) / 12).to(DEVICE, kind)


def true_scores(x: Tensor, w: Tensor) -> Tensor:
    logits = x.double().cpu() @ w.double().cpu().t()
    return torch.log1p(torch.exp(logits.clamp(max=300))).sqrt()


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_the_bias_chooses_and_the_scores_weigh(tokens: int, kind: torch.dtype, twin: bool) -> None:
    x, w = (8 * torch.randn(tokens, D)).to(DEVICE, kind), weight(kind)
    bias = torch.randn(E, device=DEVICE)
    experts, weights = pick(gate, twin)(x, w, K, SCALE, bias)
    assert experts.shape == weights.shape == (tokens, K)
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    scores = true_scores(x, w)
    want = (scores + bias.double().cpu()).topk(K)
    got = (scores + bias.double().cpu()).gather(1, experts.cpu())
    assert torch.allclose(got, want.values, atol=1e-4)  # the order of close ones may differ
    share = scores.gather(1, experts.cpu())
    share = share / share.sum(-1, keepdim=True) * SCALE
    assert torch.allclose(weights.double().cpu(), share, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("twin", TWINS)
def test_a_row_with_a_nan_gets_as_many_experts_and_spoils_no_other(twin: bool) -> None:
    x, w = torch.randn(3, D).to(DEVICE, torch.bfloat16), weight(torch.bfloat16)
    bias = torch.randn(E, device=DEVICE)
    sound = pick(gate, twin)(x, w, K, SCALE, bias)
    x[1, 5] = float("nan")
    experts, weights = pick(gate, twin)(x, w, K, SCALE, bias)
    assert len(set(experts[1].tolist()) & set(range(E))) == K
    assert bool(weights[1].isnan().all())
    for found, before in zip((experts, weights), sound, strict=True):
        assert torch.equal(found[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("twin", TWINS)
def test_of_equal_sums_the_lowest_id_is_chosen(twin: bool) -> None:
    w = weight(torch.bfloat16)
    w[5], w[9], w[20] = w[2], w[2], w[2]
    x = torch.randn(4, D).to(DEVICE, torch.bfloat16)
    bias = torch.zeros(E, device=DEVICE)
    bias[[2, 5, 9, 20]] = 50.0
    experts, _ = pick(gate, twin)(x, w, 3, SCALE, bias)
    assert experts.tolist() == [[2, 5, 9]] * 4


@pytest.mark.parametrize("twin", TWINS)
def test_hash_layers_take_the_table_s_experts(twin: bool) -> None:
    x, w = torch.randn(5, D).to(DEVICE, torch.bfloat16), weight(torch.float32)
    table = torch.stack([torch.randperm(E)[:K] for _ in range(V)]).to(DEVICE)
    ids = torch.tensor([3, -1, V, 0, V + 1000], device=DEVICE)
    experts, weights = pick(gate, twin)(x, w, K, SCALE, None, table, ids)
    assert torch.equal(experts, table[[3, 0, V - 1, 0, V - 1]])
    share = true_scores(x, w).gather(1, experts.cpu())
    share = share / share.sum(-1, keepdim=True) * SCALE
    assert torch.allclose(weights.double().cpu(), share, rtol=1e-4)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("size", [-40.0, -16.0, 30.0])
def test_small_and_large_scores_keep_their_ratios(size: float, twin: bool) -> None:
    x = torch.ones(1, D, device=DEVICE)
    w = (size + torch.rand(E, 1)).to(DEVICE) * torch.ones(E, D, device=DEVICE) / D
    experts, weights = pick(gate, twin)(x, w, K, 1.0, torch.zeros(E, device=DEVICE))
    share = true_scores(x, w).gather(1, experts.cpu())
    want = share / share.sum(-1, keepdim=True)
    assert torch.allclose(weights.double().cpu(), want, rtol=1e-3)


@pytest.mark.triton
def test_a_token_s_choice_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:  # the same paths with fewer tokens
        monkeypatch.setattr(launches, "_APART_ROWS", 1)
    tokens = 300 if GPU else 3
    x, w = torch.randn(tokens, D).to(DEVICE, torch.bfloat16), weight(torch.bfloat16)
    bias = torch.randn(E, device=DEVICE)
    together = gate(x, w, K, SCALE, bias)
    for count in (1, 17, 64, 128, 129):
        if count < tokens:
            alone = gate(x[:count], w, K, SCALE, bias)
            assert torch.equal(alone[0], together[0][:count])
            assert torch.equal(alone[1], together[1][:count])


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 511), (3, 513)])
def test_expert_outputs_are_added_in_order(
    tokens: int, width: int, kind: torch.dtype, twin: bool
) -> None:
    parts = (torch.randn(tokens, K, width) * 10.0 ** torch.randint(-6, 6, (tokens, K, 1))).to(kind)
    got = pick(combine, twin)(parts.to(DEVICE))
    assert got.dtype == torch.float32
    want = parts[:, 0].float()
    for k in range(1, K):
        want = want + parts[:, k].float()
    assert torch.equal(got.cpu(), want)
