from __future__ import annotations

import math

import pytest
import torch
from configs_oracle import BASE
from torch import Tensor

from whalepod.model.gate import Gate
from whalepod.model.shape import ModelConfig

D, E, K, TOKENS, VOCAB, SCALE = 16, 9, 3, 40, 50, 2.5
CONFIG = ModelConfig.from_dict(
    BASE
    | {
        "hidden_size": D,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "num_hash_layers": 1,
        "vocab_size": VOCAB,
        "routed_scaling_factor": SCALE,
    }
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def score(logit: float) -> float:
    return math.sqrt(logit if logit > 20 else math.log1p(math.exp(logit)))


def scores(x: list[float], weight: Tensor) -> list[float]:
    return [score(sum(a * b for a, b in zip(x, row, strict=True))) for row in weight.tolist()]


def shares(s: list[float], chosen: list[int]) -> dict[int, float]:
    total = sum(s[e] for e in chosen)
    return {e: s[e] / total * SCALE for e in chosen}


def routed(gate: Gate, x: Tensor, ids: Tensor) -> list[dict[int, float]]:
    routes = gate.route(x, ids)
    assert routes.experts_TK.shape == routes.weights_TK.shape == (len(x), K)
    assert routes.weights_TK.dtype == torch.float32
    pairs = zip(routes.experts_TK.tolist(), routes.weights_TK.tolist(), strict=True)
    return [dict(zip(experts, weights, strict=True)) for experts, weights in pairs]


@pytest.mark.parametrize("size", [1.0, 12.0], ids=["usual", "beyond softplus's threshold"])
def test_scores_choose_with_the_bias_and_weigh_without(size: float) -> None:
    x, weight, bias = size * random(TOKENS, D), random(E, D, seed=1) / 2, random(E, seed=2)
    got = routed(Gate(CONFIG, 1, weight, bias, None), x, torch.zeros(TOKENS, dtype=torch.int64))
    biased_mattered = 0
    for t in range(TOKENS):
        s = scores(x[t].tolist(), weight)
        ranked = sorted(range(E), key=lambda e: -(s[e] + bias[e].item()))
        assert got[t] == pytest.approx(shares(s, ranked[:K]), rel=1e-4)
        assert sum(got[t].values()) == pytest.approx(SCALE, rel=1e-5)
        biased_mattered += set(ranked[:K]) != set(sorted(range(E), key=lambda e: -s[e])[:K])
    assert biased_mattered > 0


def test_hash_layers_take_the_table_s_experts_and_the_gate_s_weights() -> None:
    x, weight = random(TOKENS, D), random(E, D, seed=1)
    table = torch.stack([torch.randperm(E)[:K] for _ in range(VOCAB)])
    ids = torch.randint(0, VOCAB, (TOKENS,))
    got = Gate(CONFIG, 0, weight, None, table).route(x, ids)
    assert torch.equal(got.experts_TK, table[ids])
    for t in range(TOKENS):
        want = shares(scores(x[t].tolist(), weight), table[ids[t]].tolist())
        assert got.weights_TK[t].tolist() == pytest.approx(list(want.values()), rel=1e-4)


def test_ids_outside_the_vocabulary_do_not_read_past_the_table() -> None:
    table = torch.stack([(torch.arange(K) + v) % E for v in range(VOCAB)])
    gate = Gate(CONFIG, 0, random(E, D), None, table)
    got = gate.route(random(4, D), torch.tensor([-1, VOCAB, VOCAB + 1000, 7]))
    assert torch.equal(got.experts_TK, table[[0, VOCAB - 1, VOCAB - 1, 7]])


def test_vanishing_scores_give_finite_weights() -> None:
    weight = -torch.ones(E, D)
    got = Gate(CONFIG, 1, weight, torch.zeros(E), None).route(
        20 * torch.ones(2, D), torch.zeros(2, dtype=torch.int64)
    )
    assert torch.isfinite(got.weights_TK).all()


def test_bf16_input_is_scored_in_fp32() -> None:
    x, weight, bias = random(TOKENS, D).bfloat16(), random(E, D, seed=1), random(E, seed=2)
    gate, ids = Gate(CONFIG, 1, weight, bias, None), torch.zeros(TOKENS, dtype=torch.int64)
    assert routed(gate, x, ids) == routed(gate, x.float(), ids)


def test_a_gate_takes_its_tensors_by_their_official_names() -> None:
    weights = {
        "layers.0.ffn.gate.weight": random(E, D),
        "layers.0.ffn.gate.tid2eid": torch.zeros(VOCAB, K, dtype=torch.int64),
        "layers.1.ffn.gate.weight": random(E, D, seed=1),
        "layers.1.ffn.gate.bias": random(E, seed=2),
    }
    hashed, scored = (Gate.of(CONFIG, i, weights, f"layers.{i}") for i in (0, 1))
    assert hashed.table_VK is weights["layers.0.ffn.gate.tid2eid"]
    assert hashed.bias_E is None
    assert scored.bias_E is weights["layers.1.ffn.gate.bias"]
    assert scored.table_VK is None
