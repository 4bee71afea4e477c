from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from whalepod.engine.request import Sampling
from whalepod.engine.sampler import draw, sample, uniform

DRAWS = 3000
LOGITS = [1.0, 3.2, -0.7, 2.5, 3.1, 0.2, -4.0, 2.45, 1.9, 0.0]
SETTINGS = [
    Sampling(seed=1),
    Sampling(temperature=0.5, seed=2),
    Sampling(temperature=2.0, seed=3),
    Sampling(top_k=3, seed=4),
    Sampling(top_k=1, seed=5),
    Sampling(top_k=100, seed=6),
    Sampling(top_p=0.5, seed=7),
    Sampling(top_p=0.9, seed=8),
    Sampling(top_p=1e-9, seed=9),
    Sampling(top_k=4, top_p=0.8, seed=10),
    Sampling(temperature=1.5, top_k=6, top_p=0.7, seed=11),
    Sampling(temperature=0.2, top_p=0.95, seed=12),
]


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def allowed(logits: list[float], s: Sampling) -> dict[int, float]:
    """The tokens that may be drawn and with what probability: temperature, top-k, then top-p."""
    scaled = [x / s.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    order = order[: s.top_k] if s.top_k else order
    chances = softmax([scaled[i] for i in order])
    kept, mass = [], 0.0
    for i, p in zip(order, chances, strict=True):
        kept.append((i, p))
        mass += p
        if mass >= s.top_p:
            break
    return {i: p / mass for i, p in kept}


def chi_square(counts: dict[int, int], chances: dict[int, float]) -> float:
    """Standard deviations by which the statistic exceeds its mean (pooling rare cells)."""
    n, rest, cells = sum(counts.values()), [0.0, 0.0], []
    for token, chance in chances.items():
        if chance * n < 5:
            rest = [rest[0] + counts.get(token, 0), rest[1] + chance * n]
        else:
            cells.append((counts.get(token, 0), chance * n))
    if rest[1] > 1:
        cells.append((rest[0], rest[1]))
    freedom = len(cells) - 1
    if freedom <= 0:
        return 0.0
    return (sum((o - e) ** 2 / e for o, e in cells) - freedom) / math.sqrt(2 * freedom)


def count(logits: Tensor, s: Sampling, positions: range) -> dict[int, int]:
    out: dict[int, int] = {}
    for position in positions:
        token = draw(logits, s, position)
        out[token] = out.get(token, 0) + 1
    return out


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution_over_the_allowed_set(settings: Sampling) -> None:
    chances = allowed(LOGITS, settings)
    counts = count(torch.tensor(LOGITS), settings, range(DRAWS))
    assert set(counts) <= set(chances)
    likely = {t for t, p in chances.items() if p * DRAWS > 20}
    assert likely <= set(counts)
    assert chi_square(counts, chances) < 4


def test_the_chi_square_test_can_fail() -> None:
    counts = count(torch.tensor(LOGITS), Sampling(seed=1), range(DRAWS))
    assert chi_square(counts, allowed(LOGITS, Sampling(temperature=1.2))) > 4


@pytest.mark.parametrize("top_p", [0.1, 0.33, 0.6, 0.99, 0.999999])
@pytest.mark.parametrize("top_k", [0, 2, 17])
def test_allowed_sets_of_random_rows(top_p: float, top_k: int) -> None:
    g = torch.Generator().manual_seed(5)
    for row in 3 * torch.randn(20, 60, generator=g):
        settings = Sampling(top_p=top_p, top_k=top_k, seed=3)
        drawn = {draw(row, settings, position) for position in range(20)}
        assert drawn <= set(allowed(row.tolist(), settings))


def test_seeds_draw_independently() -> None:
    """The seed enters as well as the position does: one position, many seeds."""
    chances, counts = allowed(LOGITS, Sampling()), {}
    row = torch.tensor(LOGITS)
    for seed in range(DRAWS):
        token = draw(row, Sampling(seed=seed), 17)
        counts[token] = counts.get(token, 0) + 1
    assert chi_square(counts, chances) < 4


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)], ids=str)
def test_neighbours_in_seed_and_position_are_uncorrelated(step: tuple[int, int]) -> None:
    cells = dict.fromkeys(itertools.product(range(5), repeat=2), 0)
    for seed, position in itertools.product(range(60), range(1, 61)):
        a = uniform(seed, position)
        b = uniform(seed + step[0], position + step[1])
        cells[int(5 * a), int(5 * b)] += 1
    numbered = dict(enumerate(cells.values()))
    assert chi_square(numbered, dict.fromkeys(numbered, 1 / 25)) < 4


def test_uniform_stays_below_one_for_any_seed() -> None:
    seeds = [0, 1, 2**31, 2**63, 2**64 - 1, -5]
    values = [uniform(seed, position) for seed in seeds for position in (0, 1, 2**20)]
    assert all(0 <= v < 1 for v in values)
    assert len(set(values)) == len(values)


def test_a_row_s_token_depends_on_nothing_but_its_arguments() -> None:
    g = torch.Generator().manual_seed(0)
    rows = 2 * torch.randn(12, 50, generator=g)
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(12)]
    settings[4] = Sampling(temperature=0)
    positions = [7 * i for i in range(12)]
    together = sample(rows, settings, positions)
    torch.manual_seed(99)  # the global generator takes no part
    for i in reversed(range(12)):
        alone = sample(rows[i : i + 1], settings[i : i + 1], positions[i : i + 1])[0]
        assert alone.token == together[i].token
        assert alone.logprob == pytest.approx(together[i].logprob, abs=1e-6)
    moved = [draw(rows[0], settings[0], p) for p in range(50)]
    assert len(set(moved)) > 1


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    row = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0, -1.0]])
    assert sample(row, [Sampling(temperature=0, seed=3)], [0])[0].token == 1
    flat = torch.zeros(1, 1000)
    assert sample(flat, [Sampling(temperature=0)], [123])[0].token == 0


def test_ties_at_the_edge_of_top_k_keep_the_lowest_ids() -> None:
    row = torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0, 0.0])
    assert set(count(row, Sampling(top_k=2, seed=1), range(100))) == {1, 2}
    assert set(count(row, Sampling(top_p=0.4, seed=1), range(100))) == {1, 2}


def test_logprob_is_of_the_unmodified_logits() -> None:
    row = torch.tensor([LOGITS])
    chances = softmax(LOGITS)
    for settings in [*SETTINGS, Sampling(temperature=0)]:
        made = sample(row, [settings], [3])[0]
        assert made.logprob == pytest.approx(math.log(chances[made.token]), abs=1e-5)


def test_tokens_masked_to_minus_infinity_are_never_drawn() -> None:
    row = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert set(count(row, Sampling(seed=2), range(300))) == {0, 2}
