"""Penalties, biases and banned tokens, against the formulas written out, and wherever they run."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from whalepod.config import Config
from whalepod.engine.adjust import adjusted
from whalepod.engine.local import open_engine
from whalepod.engine.payoff import Payoff
from whalepod.engine.request import Adjust, Request, Sampling
from whalepod.engine.sampler import draw, sample
from whalepod.engine.source import Source
from whalepod.engine.step import MicroBatch, Part, Step
from whalepod.errors import RequestError
from whalepod.ingress.options import Options, adjust_of
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny import preset_config

MODEL = Path(__file__).parent.parent / "models/demo"
SHAPE = ModelConfig.from_dict(preset_config("tiny"))
CASES = {
    "presence": Adjust(presence=1.5),
    "frequency": Adjust(frequency=-0.7),
    "both": Adjust(presence=0.4, frequency=0.9),
    "repetition": Adjust(repetition=1.7),
    "bias": Adjust(bias=((3, 5.0), (0, -100.0))),
    "allowed": Adjust(allowed=(1, 4)),
    "banned": Adjust(banned=(4, 5)),
    "min_tokens": Adjust(min_tokens=4, stop_ids=(2,)),
    "all": Adjust(0.3, 0.2, 1.2, ((1, 2.0),), (1, 2, 4, 5), (5,), 4, (2,)),
}


def written_out(logits: list[float], a: Adjust, prompt: int, tokens: list[int]) -> list[float]:
    out = []
    for token, value in enumerate(logits):
        value += dict(a.bias).get(token, 0.0)
        early = len(tokens) - prompt < a.min_tokens and token in a.stop_ids
        if (a.allowed and token not in a.allowed) or token in a.banned or early:
            value = -math.inf
        if token in tokens:
            value = value / a.repetition if value > 0 else value * a.repetition
        count = tokens[prompt:].count(token)
        out.append(value - (a.presence + a.frequency * count if count else 0.0))
    return out


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_changed_by_the_formulas(name: str) -> None:
    rng = Random(name)
    for _ in range(40):
        logits = [rng.uniform(-4, 4) for _ in range(7)]
        tokens = [rng.randrange(7) for _ in range(rng.randrange(1, 9))]
        prompt = rng.randrange(1, len(tokens) + 1)
        row = torch.tensor(logits)
        got = adjusted(row, CASES[name], prompt, tokens)
        expected = written_out(logits, CASES[name], prompt, tokens)
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert row.tolist() == torch.tensor(logits).tolist()


def test_min_p_keeps_what_is_likely_enough() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = {draw(row, Sampling(min_p=0.4, seed=s), 0) for s in range(300)}
    assert drawn == {0, 1}
    assert {draw(row, Sampling(min_p=1.0, seed=s), 0) for s in range(50)} == {0}


def test_the_logprob_is_that_of_the_model() -> None:
    row = torch.tensor([[2.0, 1.0, 0.0]])
    wanted = Sampling(0.0, adjust=Adjust(banned=(0,)))
    (got,) = sample(row, [wanted], [5], [(1, (0,))])
    assert got.token == 1
    assert got.logprob == pytest.approx(float(row.log_softmax(-1)[0, 1]))


def test_settings_travel_between_stages() -> None:
    sampling = Sampling(0.7, 0.9, 5, 3, 0.1, CASES["all"])
    part = Part(1, 4, (7, 8), (0,), (sampling, 6), history=(3, (1, 2, 3, 9, 7, 8)))
    step = Step((MicroBatch((part,)),))
    assert Step.from_bytes(step.to_bytes()) == step


def run(topology: dict[str, Any], **engine: Any) -> dict[str, list[int]]:
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": topology,
            "engine": {"max_batch": 8, "max_step_tokens": 64, **engine},
        }
    )
    todo, rng = [], Random(4)
    for i, adjust in enumerate(CASES.values()):
        wide = Adjust(
            adjust.presence, adjust.frequency, adjust.repetition, adjust.bias, (), adjust.banned
        )
        ids = tuple(rng.randrange(3, 4000) for _ in range(20 + 13 * i))
        settings = Sampling(0.0 if i % 2 else 0.8, seed=i, min_p=0.01, adjust=wide)
        todo.append(Request(f"{i}", ids, 20, settings, (), True))
    out: dict[str, list[int]] = {}
    with torch.inference_mode():
        opened = open_engine(config, Source(config.model, Checkpoint.open(MODEL)))
        try:
            for event in opened.run(todo):
                out.setdefault(event.request_id, []).append(event.token)
        finally:
            opened.close()
    return out


@pytest.mark.slow
def test_the_same_tokens_in_every_layout_and_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run({"layout": "single"}, max_batch=1)
    assert run({"layout": "ep", "attention": 2}) == alone
    assert run({"stages": 2, "experts": 2}) == alone
    assert run({"layout": "single"}, kv_tokens=512) == alone
    monkeypatch.setattr(Payoff, "choose", lambda self, running: self.drafts)
    assert run({"layout": "single"}, draft_tokens=2) == alone


def test_nothing_asked_costs_nothing_and_nonsense_is_refused() -> None:
    assert adjust_of(Options(), SHAPE) is None
    assert adjust_of(Options(min_tokens=3, stop_token_ids=(7,)), SHAPE) == Adjust(
        min_tokens=3, stop_ids=(1, 7)
    )
    for options, fact in (
        (Options(logit_bias=((9999, 1.0),)), "9999 is outside the vocabulary, 0 to 1023"),
        (Options(allowed_token_ids=(5,), banned_token_ids=(5,)), "leave no token to choose"),
        (Options(allowed_token_ids=(1,), min_tokens=2), "leave no token to choose"),
        (Options(max_tokens=3, min_tokens=4), "min_tokens 4 exceeds max_tokens 3"),
    ):
        with pytest.raises(RequestError, match=fact):
            adjust_of(options, SHAPE)
