"""The sampler's twin against the draw in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from twins import DEVICE, GPU, poisoned, twin

from whalepod.engine.request import Adjust, Sampling
from whalepod.engine.sampler import sample as draw_rows
from whalepod.kernels import sample_triton
from whalepod.kernels.draw import best_tokens
from whalepod.kernels.sample import sample

pytestmark = pytest.mark.triton

SIZES = [129_280, 32_000, 1000, 5] if GPU else [150]
ROWS = 12 if GPU else 1
OFF = float("-inf")
# temperature, top-k, top-p, log of min-p
FILTERS = [
    (0.0, 0, 1.0, OFF),
    (1.0, 0, 1.0, OFF),
    (0.7, 50, 1.0, OFF),
    (1.0, 0, 0.8971, OFF),
    (1.3, 40, 0.7963, math.log(0.05)),
    (2.0, 0, 1.0, math.log(0.1)),
    (50.0, 10**6, 0.9871, OFF),
    (0.01, 3, 0.0, OFF),
]


def settings(filters: tuple[float, ...], rows: int) -> Tensor:
    fixed = torch.tensor([filters] * rows, dtype=torch.float64).view(rows, 4)
    return torch.cat([fixed, torch.rand(rows, 1, dtype=torch.float64)], 1).to(DEVICE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, so small that rows have several slices and candidates several tiles."""
    if not GPU:
        monkeypatch.setattr(sample_triton, "SLICE", 64)
        monkeypatch.setattr(sample_triton, "TILE", 64)
        monkeypatch.setattr(sample_triton, "FEW", 32)


def differences(logits: Tensor, chosen: Tensor) -> int:
    """Rows with another token, but for neighbours where the number falls within 1e-6 of a border."""
    filtered = bool((chosen[:, 1] > 0).any() or (chosen[:, 2] < 1).any())
    with poisoned():
        tokens, logprobs = twin(sample)(logits, chosen, filtered)
    wanted, wanted_logprobs = sample.reference(logits, chosen)
    same = tokens == wanted
    torch.testing.assert_close(logprobs[same], wanted_logprobs[same], atol=2e-5, rtol=1e-5)
    return sum(not near(logits[n], chosen[n], int(tokens[n])) for n in (~same).nonzero()[:, 0])


def near(logits: Tensor, chosen: Tensor, token: int) -> bool:
    """Whether numbers a little smaller and larger enclose a token."""
    ends = []
    for by in (-1e-6, 1e-6):
        moved = chosen.clone()
        moved[4] = (moved[4] + by).clamp(0, 1 - 2.0**-53)
        ends.append(int(sample.reference(logits[None], moved[None])[0]))
    return ends[0] <= token <= ends[1]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_the_draw(size: int, filters: tuple[float, ...]) -> None:
    """Peaked, flat and rounded logits: the last have many ties, within and across slices."""
    for logits in (
        3 * torch.randn(ROWS, size),
        0.01 * torch.randn(ROWS, size),
        torch.randn(ROWS, size).mul(2).round(),
        torch.zeros(1, size),
    ):
        rows = logits.to(DEVICE)
        assert differences(rows, settings(filters, len(rows))) == 0


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((2, SIZES[0]), OFF, device=DEVICE)
    logits[:, [3, 77, 149]] = torch.tensor([-0.0, 0.0, -1.0], device=DEVICE)
    for filters in FILTERS[:4]:
        assert differences(logits, settings(filters, len(logits))) == 0


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.randn(4, SIZES[0], device=DEVICE)
    chosen = settings((1.0, 0, 1.0, OFF), 4)
    chosen[:, 4] = torch.tensor([0.0, 1 - 2.0**-53, 2.0**-53, 0.5])
    tokens, _ = twin(sample)(logits, chosen)
    wanted, _ = sample.reference(logits, chosen)
    ends = [0, 2, 3]
    assert torch.equal(tokens[ends], wanted[ends])
    # The last of all up to the rounding of the weights.
    assert tokens[1] >= SIZES[0] - 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where it interprets
@pytest.mark.parametrize("filters", FILTERS)
def test_spoilt_rows_give_a_token_and_no_log_probability(filters: tuple[float, ...]) -> None:
    size = SIZES[0]
    logits = torch.randn(5, size)
    logits[1, 7], logits[2], logits[3, size - 1], logits[4] = math.nan, math.nan, math.inf, OFF
    with poisoned():
        tokens, logprobs = twin(sample)(logits.to(DEVICE), settings(filters, 5))
    assert bool(((tokens >= 0) & (tokens < size)).all())
    assert logprobs.isfinite().tolist() == [True, *[False] * 4]


def test_no_rows_and_rows_alone() -> None:
    logits = torch.randn(70 if GPU else 3, SIZES[0], device=DEVICE)
    chosen = settings((1.0, 20, 0.9, OFF), len(logits))
    chosen[::2, 1:3] = torch.tensor([0.0, 1.0])  # every second row is not filtered
    assert twin(sample)(logits[:0], chosen[:0])[0].shape == (0,)
    together = twin(sample)(logits, chosen)
    for n in (len(logits) - 1, len(logits) - 2):
        row, own = logits[n : n + 1], chosen[n : n + 1]
        for filtered in (True, *([False] if n % 2 == 0 else [])):
            alone = twin(sample)(row, own, filtered)
            assert int(alone[0]) == int(together[0][n])
            assert float(alone[1]) == float(together[1][n])


@pytest.mark.skipif(not GPU, reason="the engine samples on the device on CUDA only")
def test_the_engine_draws_the_tokens_of_the_cpu() -> None:
    logits = 3 * torch.randn(6, 1000)
    plain = [Sampling(0.0), Sampling(1.0, seed=3), Sampling(0.8, 0.91, 40, 5, 0.02)]
    banned = Sampling(1.0, seed=4, adjust=Adjust(banned=(1, 2)))
    settings, positions = [*plain, banned, *plain[:2]], [7, 8, 9, 10, 11, 12]
    histories = [(1, (5, 6))] * 6
    wanted = draw_rows(logits, settings, positions, histories)
    made = draw_rows(logits.cuda(), settings, positions, histories)
    assert [d.token for d in made] == [d.token for d in wanted]
    assert [d.logprob for d in made] == pytest.approx([d.logprob for d in wanted], abs=1e-4)


def test_the_best_token_and_norm_of_a_row_do_not_depend_on_its_company() -> None:
    logits = 3 * torch.randn(9, SIZES[0], device=DEVICE).mul(4).round().div(4)  # with ties
    with poisoned():
        places, norms = twin(best_tokens)(logits)
    wanted, wanted_norms = best_tokens.reference(logits)
    assert torch.equal(places, wanted)
    torch.testing.assert_close(norms, wanted_norms, atol=2e-5, rtol=1e-6)
    assert twin(best_tokens)(logits[:0])[0].shape == (0,)
    for n in (0, 8):
        place, norm = twin(best_tokens)(logits[n : n + 1])
        assert (int(place), float(norm)) == (int(places[n]), float(norms[n]))
    _, drawn = twin(sample)(logits, settings((0.0, 0, 1.0, OFF), 9))
    assert torch.equal(drawn, logits.gather(1, places.unsqueeze(1)).squeeze(1) - norms)
