"""Log-probabilities of prompts: the same bits as those of generated tokens, told once, in one pass."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.config import Config
from whalepod.engine import outcome
from whalepod.engine.handover import outcome_bytes, pack_outcome, unpack_outcome
from whalepod.engine.local import SingleEngine, open_engine
from whalepod.engine.prompt import PromptLogprobs, most_probable, score
from whalepod.engine.request import Request, Sampling, Sequence, TokenEvent
from whalepod.engine.sampler import Drawn, best
from whalepod.engine.source import Source
from whalepod.engine.step import MicroBatch, Part, Step
from whalepod.kernels.draw import ranked
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.whole import WholeModel

PROMPT = tuple(range(40, 70))
K = 3
Row = tuple[int, float, int, tuple[tuple[int, float], ...]]


def run(
    tiny: Path, requests: list[Request], topology: dict[str, Any] | None = None, **engine: Any
) -> dict[str, list[TokenEvent]]:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": topology or {"layout": "single"},
            "engine": {"max_step_tokens": 24, **engine},
        }
    )
    found = open_engine(config, Source(config.model, Checkpoint.open(tiny)))
    out: dict[str, list[TokenEvent]] = defaultdict(list)
    for event in found.run(requests):
        out[event.request_id].append(event)
    found.close()
    return out


def rows(told: PromptLogprobs | None, tokens: tuple[int, ...]) -> list[Row]:
    """What is told of every token but the first, with its alternatives."""
    assert told is not None
    alternatives = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(told.ids_RK.tolist(), told.values_RK.tolist(), strict=True)
    ]
    columns = (tokens[1:], told.logprobs_R.tolist(), told.ranks_R.tolist(), alternatives)
    return list(zip(*columns, strict=True))


def generated(events: list[TokenEvent]) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    return [(e.token, e.logprob, e.alternatives) for e in events]


@pytest.fixture(scope="module")
def answer(tiny: Path) -> list[TokenEvent]:
    """A greedy answer to the prompt."""
    asked = Request("asked", PROMPT, 20, Sampling(0.0, alternatives=K))
    return run(tiny, [asked])["asked"]


@pytest.fixture(scope="module")
def known(answer: list[TokenEvent]) -> tuple[int, ...]:
    """Prompt and answer."""
    return (*PROMPT, *(event.token for event in answer))


@pytest.fixture(scope="module")
def expected(tiny: Path, known: tuple[int, ...]) -> list[Row]:
    found = run(tiny, [Request("p", known, 0, prompt_logprobs=K)], max_step_tokens=256)
    return rows(found["p"][0].prompt, known)


def test_bits_are_those_of_generated_tokens(answer: list[TokenEvent], expected: list[Row]) -> None:
    told = [(token, logprob, others) for token, logprob, _, others in expected]
    assert told[len(PROMPT) - 1 :] == generated(answer)
    assert all(rank == 1 for _, _, rank, _ in expected[len(PROMPT) - 1 :])


def test_they_are_those_of_the_whole_model(
    tiny: Path, known: tuple[int, ...], expected: list[Row]
) -> None:
    checkpoint = Checkpoint.open(tiny)
    model = WholeModel(checkpoint.config, checkpoint.everything())
    logits = model.forward(model.new_state(64), list(known))[:-1].log_softmax(-1)
    for row, (token, logprob, rank, others) in zip(logits, expected, strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert rank == int((row > row[token]).sum()) + 1
        values, ids = row.topk(K)
        assert [i for i, _ in others] == ids.tolist()
        assert [p for _, p in others] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("topology", "engine"),
    [
        ({"layout": "single"}, {"max_step_tokens": 1}),
        ({"layout": "single"}, {"max_step_tokens": 7, "draft_tokens": 2}),
        ({"stages": 2, "experts": 2}, {"max_step_tokens": 16}),
        ({"layout": "ep", "attention": 2}, {}),
        ({"attention": 1, "experts": 1, "micro_batches": 3, "micro_batch_rows": 1}, {}),
    ],
)
def test_they_are_the_same_to_the_bit(
    topology: dict[str, Any],
    engine: dict[str, Any],
    tiny: Path,
    known: tuple[int, ...],
    expected: list[Row],
) -> None:
    todo = [
        Request("asked", known, 3, Sampling(0.0), prompt_logprobs=K),
        Request("few", known[:11], 0, prompt_logprobs=1),
        Request("silent", PROMPT[:9], 4, Sampling(0.0)),
    ]
    found = run(tiny, todo, topology, **engine)
    assert rows(found["asked"][0].prompt, known) == expected
    few = [(*row[:3], row[3][:1]) for row in expected[:10]]
    assert rows(found["few"][0].prompt, known[:11]) == few
    assert [e.prompt for events in found.values() for e in events[1:]] == [None] * 5
    assert found["silent"][0].prompt is None
    assert [(e.token, e.finish) for e in found["few"]] == [(-1, "length")]
    assert len(found["asked"]) == 3


def test_asking_changes_no_token(tiny: Path) -> None:
    both = run(
        tiny,
        [
            Request("asked", PROMPT, 6, Sampling(0.8, seed=5), prompt_logprobs=0),
            Request("silent", PROMPT, 6, Sampling(0.8, seed=5)),
        ],
    )
    assert generated(both["asked"]) == generated(both["silent"])
    told = both["asked"][0].prompt
    assert told is not None
    assert told.ids_RK.shape == (len(PROMPT) - 1, 0)


def test_a_prompt_of_one_token_has_nothing_to_tell(tiny: Path) -> None:
    found = run(tiny, [Request("one", (5,), 2, prompt_logprobs=K)])["one"]
    assert len(found) == 2
    assert found[0].prompt is not None
    assert len(found[0].prompt) == 0


LONG = tuple(i * 37 % 900 + 20 for i in range(300))


def test_what_the_prefix_cache_knows_is_computed_again(tiny: Path) -> None:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"layout": "single"},
            "engine": {"max_step_tokens": 512, "prefix_snapshots": 4},
        }
    )
    engine = open_engine(config, Source(config.model, Checkpoint.open(tiny)))
    (first,) = engine.run([Request("a", LONG, 0, prompt_logprobs=K)])
    (again,) = engine.run([Request("b", LONG, 0, prompt_logprobs=K)])
    (silent,) = engine.run([Request("c", LONG, 1)])
    assert again.cached == 0
    assert silent.cached > 0
    assert rows(again.prompt, LONG) == rows(first.prompt, LONG)


@pytest.mark.parametrize("snapshots", [0, 4])
@pytest.mark.parametrize("steps", [2, 7])
def test_preempted_requests_tell_once(steps: int, snapshots: int, tiny: Path) -> None:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"layout": "single"},
            "engine": {
                "max_step_tokens": 64,
                "max_batch": 1,
                "prefix_snapshots": snapshots,
            },
        }
    )
    asked = Request("asked", LONG, 5, Sampling(0.0), priority=1, prompt_logprobs=K)
    alone = run(tiny, [asked], max_step_tokens=64)["asked"]
    engine = SingleEngine(config, Source(config.model, Checkpoint.open(tiny)))
    engine.loop.submit(asked)
    for _ in range(steps):  # in the prompt, or behind it
        engine.step()
    found = engine.run([Request("urgent", PROMPT, 2)])
    events = [e for e in found if e.request_id == "asked"]
    assert sum(e.preempted for e in events) == 1
    assert generated(events) == generated(alone)
    assert rows(events[0].prompt, LONG) == rows(alone[0].prompt, LONG)
    assert not any(e.prompt for e in events[1:])


def test_only_what_is_not_told_is_asked_again() -> None:
    sequence = Sequence(Request("r", tuple(range(10)), 4, prompt_logprobs=1))
    assert sequence.skippable == 0
    assert sequence.tell(4) == (0, (1, 2, 3, 4), 1)
    sequence.learn(PromptLogprobs.from_bytes(bytes(4 * 16), 1))
    assert sequence.skippable == 4
    sequence.computed = 2  # given way, and gone on from a known prefix
    assert sequence.tell(4) is None
    assert sequence.tell(6) == (2, (5, 6), 1)
    assert sequence.tell(10) == (2, (5, 6, 7, 8, 9), 1)
    sequence.learn(PromptLogprobs.from_bytes(bytes(5 * 16), 1))
    assert sequence.skippable == 10
    assert sequence.tell(10) is None


def test_few_rows_of_logits_exist_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watch(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> PromptLogprobs:
        sizes.append(len(logits))
        return score(logits, tokens, count)

    monkeypatch.setattr(outcome, "score", watch)
    run(tiny, [Request("r", LONG, 0, prompt_logprobs=0)], max_step_tokens=512)
    assert sum(sizes) == len(LONG) - 1  # one pass
    assert max(sizes) <= 128


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.randint(-4, 4, (40, 64), generator=torch.Generator().manual_seed(1)).float()
    tokens = torch.arange(40)
    told = score(logits, tokens, 6)
    assert most_probable(logits, 6).tolist() == [ranked(row)[:6].tolist() for row in logits]
    for i, row in enumerate(logits):
        assert ranked(row).tolist().index(i) + 1 == told.ranks_R[i]
        alternatives = tuple(zip(told.ids_RK[i].tolist(), told.values_RK[i].tolist(), strict=True))
        assert alternatives == best(row, 6)


def test_the_last_stage_answers_in_as_many_bytes_as_expected() -> None:
    told = [
        score(torch.randn(3, 32), torch.tensor([1, 2, 3]), 2),
        score(torch.randn(1, 32), torch.tensor([4]), 0),
    ]
    drawn = [Drawn(7, -0.5, ((7, -0.5), (8, -1.5)))]
    parts = (
        Part(0, 0, (1, 2, 3), (0,), None, tell=(0, (1, 2, 3), 2)),
        Part(1, 0, (4, 5), (1,), (Sampling(alternatives=2), 2), tell=(0, (4,), 0)),
    )
    step = Step.from_bytes(Step((MicroBatch(parts),)).to_bytes())
    assert step.micro_batches[0].parts == parts
    message = pack_outcome(drawn, told)
    assert message.numel() == outcome_bytes(step)
    got, rest = unpack_outcome(message, step)
    assert got == drawn
    assert [t.to_bytes() for t in rest] == [t.to_bytes() for t in told]
