"""Drafts change how fast tokens come, never which: not one bit of a log-probability."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from demo.documents import document
from demo.documents.talk import talk
from demo.evaluation.text import Writer

from whalepod.config import Config
from whalepod.engine.local import SingleEngine, ThreadedEngine, open_engine
from whalepod.engine.payoff import Payoff
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.engine.step import Part
from whalepod.errors import ConfigError
from whalepod.model.checkpoint import Checkpoint

MODEL = Path(__file__).parent.parent / "models/demo"
Output = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def todo() -> list[Request]:
    writer, made = Writer(MODEL), []
    for i in range(6):
        prompt = talk(Random(10**9 + i)).prompt() if i % 3 else document(Random(i), "story")[:250]
        settings = Sampling(0.0) if i % 2 else Sampling(0.9, 0.95, seed=i)
        made.append(Request(f"r{i}", writer.ids(prompt), 24 + i, settings, (1,)))
    return made


def run(
    todo: list[Request], topology: dict[str, Any], **engine: Any
) -> tuple[Output, SingleEngine | ThreadedEngine]:
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": {"micro_batch_rows": 1, **topology},
            "engine": {"max_batch": 8, **engine},
        }
    )
    out: Output = {}
    with torch.inference_mode():
        opened = open_engine(config, Source(config.model, Checkpoint.open(MODEL)))
        try:
            for event in opened.run(todo):
                out.setdefault(event.request_id, []).append((event.token, event.logprob))
        finally:
            opened.close()
    return out, opened


@pytest.fixture(scope="module")
def plain(todo: list[Request]) -> Output:
    return run(todo, {"layout": "single"})[0]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Payoff, "choose", lambda self, running: self.drafts)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_tokens_and_bits_are_those_without_drafts(
    drafts: int, todo: list[Request], plain: Output, always: None
) -> None:
    found, engine = run(todo, {"layout": "single"}, draft_tokens=drafts, max_step_tokens=40)
    assert found == plain
    assert isinstance(engine, SingleEngine)
    counters = engine.loop.counters
    assert counters.accepted > (0.7, 0.55, 0.4)[drafts - 1] * counters.drafted > 20
    assert engine.loop.scheduler.blocks.free == engine.loop.scheduler.blocks.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        {"layout": "ep", "attention": 2},
        {"attention": 2, "experts": 3},
        {"router": "attention", "experts": 2},
    ],
    ids=str,
)
def test_in_every_layout(
    topology: dict[str, Any], todo: list[Request], plain: Output, always: None
) -> None:
    assert run(todo, topology, draft_tokens=2)[0] == plain


@pytest.mark.slow
def test_under_preemption(todo: list[Request], always: None) -> None:
    long = [replace(r, prompt_ids=(r.prompt_ids * 9)[:115], ignore_eos=True) for r in todo[:4]]
    plain, _ = run(long, {"layout": "single"})
    found, engine = run(long, {"layout": "single"}, draft_tokens=3, kv_tokens=384)
    assert found == plain
    assert isinstance(engine, SingleEngine)
    assert engine.loop.scheduler.preemptions > 0


@pytest.mark.slow
def test_by_its_own_choice(todo: list[Request], plain: Output) -> None:
    assert run(todo, {"layout": "single"}, draft_tokens=3)[0] == plain


def test_a_part_yields_what_rests_on_right_guesses() -> None:
    part = Part(0, 5, (7, 8, 9), (0,), (Sampling(0.0), 6), drafts=2)
    assert part.emitted([8, 9, 4]) == [8, 9, 4]
    assert part.emitted([8, 5, 4]) == [8, 5]
    assert part.emitted([3, 9, 4]) == [3]


def test_drafting_is_kept_where_it_pays_and_dropped_where_it_does_not() -> None:
    payoff = Payoff(2)
    for _ in range(200):
        for running, seconds in ((1, {True: 0.4, False: 1.0}), (8, {True: 2.0, False: 1.0})):
            drafted = payoff.choose(running) > 0
            payoff.learn(running, drafted, seconds[drafted], 1)
    chosen = {n: sum(payoff.choose(n) > 0 for _ in range(96)) for n in (1, 8)}
    assert chosen[1] > 85
    assert chosen[8] < 10
    assert Payoff(0).choose(1) == 0


def test_stages_and_models_that_cannot_draft_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draft_tokens=2 needs topology.stages=1 \(found 2\)"):
        Config.from_dict(
            {
                "model": {"path": "x"},
                "topology": {"stages": 2},
                "engine": {"draft_tokens": 2},
            }
        )
    bare = Checkpoint.open(MODEL)
    bare.config = bare.config.model_copy(update={"num_nextn_predict_layers": 0})
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": {"layout": "single"},
            "engine": {"draft_tokens": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"no MTP block .* set engine.draft_tokens to 0"):
        open_engine(config, Source(config.model, bare))
