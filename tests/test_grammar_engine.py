"""Structured output of the demo model: it fits, and is the same wherever and however it is made."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from whalepod.config import Config
from whalepod.engine import grammar as grammar_file
from whalepod.engine.local import SingleEngine, open_engine
from whalepod.engine.payoff import Payoff
from whalepod.engine.request import Adjust, Grammar, Request, Sampling, TokenEvent
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

MODEL = Path(__file__).parent.parent / "models/demo"
EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "number"},
                "in": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
EITHER = {"anyOf": [{"type": "null"}, {"const": {"a": [1, "x"]}}, {"type": "boolean"}]}
PATTERN, WORDS = r"[a-z]{3,5}/\d{2}\n(x|y)z", ['red "q"', "gr\nün", "blue"]


def fits(schema: Any) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        jsonschema.validate(json.loads(text), schema)
        return True

    return check


def nested(text: str) -> bool:
    return re.fullmatch(r"(\()*x(\))*", text) is not None and text.count("(") == text.count(")")


CASES: dict[str, tuple[Grammar, Callable[[str], bool]]] = {
    "person": (Grammar("json", json.dumps(PERSON)), fits(PERSON)),
    "tree": (Grammar("json", json.dumps(TREE)), fits(TREE)),
    "either": (Grammar("json", json.dumps(EITHER)), fits(EITHER)),
    "regex": (Grammar("regex", PATTERN), lambda t: re.fullmatch(PATTERN, t) is not None),
    "choice": (Grammar("choice", json.dumps(WORDS)), lambda t: t in WORDS),
    "lark": (Grammar("grammar", 'start: "(" start ")" | "x"'), nested),
    "gbnf": (
        Grammar("grammar", 'root ::= "a" root | "b"'),
        lambda t: re.fullmatch("a*b", t) is not None,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.open(MODEL)
    assert found is not None
    return found


def requests(tokenizer: Tokenizer, *, plain: bool = True) -> list[Request]:
    prompt = (0, *tokenizer.encode_text("Tell me of the white whale, and of the harbour: " * 7))
    todo = [
        Request(
            f"{name}-{heat}", prompt, 90, Sampling(heat, seed=7, adjust=Adjust(grammar=g)), (1,)
        )
        for name, (g, _) in CASES.items()
        for heat in (0.0, 1.0)
    ]
    free = [Request(f"free-{i}", prompt[: 5 + i], 30, Sampling(1.0, seed=i)) for i in range(3)]
    return [*todo, *(free if plain else ())]


def opened(topology: dict[str, Any], **engine: Any) -> Any:
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": topology,
            "engine": {"max_batch": 32, "max_step_tokens": 64, **engine},
        }
    )
    return open_engine(config, Source(config.model, Checkpoint.open(MODEL)))


def run(
    todo: list[Request], topology: dict[str, Any] | None = None, **engine: Any
) -> tuple[dict[str, list[int]], Any]:
    """Tokens by request, and the engine."""
    out: dict[str, list[int]] = {}
    with torch.inference_mode():
        made = opened(topology or {"layout": "single"}, **engine)
        try:
            for event in made.run(todo):
                assert event.error is None
                out.setdefault(event.request_id, []).append(event.token)
        finally:
            made.close()
    return out, made


@pytest.fixture(scope="module")
def together(tokenizer: Tokenizer) -> dict[str, list[int]]:
    return run(requests(tokenizer))[0]


def test_text_is_what_was_asked_for(together: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    ended = 0
    for name, (_, check) in CASES.items():
        for heat in (0.0, 1.0):
            tokens = together[f"{name}-{heat}"]
            ended += tokens[-1] == EOS
            if tokens[-1] == EOS:
                assert check(tokenizer.decode(tokens[:-1])), name
            else:
                assert len(tokens) == 90
    assert ended >= 2 * len(CASES) - 2


@pytest.mark.slow
def test_the_same_alone_and_after_preemption_and_replay(
    together: dict[str, list[int]], tokenizer: Tokenizer
) -> None:
    alone, _ = run(requests(tokenizer), max_batch=1)
    assert alone == together
    tight, made = run(requests(tokenizer), kv_tokens=768, max_batch=12)
    assert tight == together
    assert made.loop.scheduler.preemptions > 0
    replayed = []
    for request in requests(tokenizer, plain=False):
        known = tuple(together[request.id][: len(together[request.id]) // 2])
        replayed.append(
            Request(
                *(request.id, request.prompt_ids, request.max_tokens, request.sampling),
                *(request.stop_ids, False, known),
            )
        )
    rest, _ = run(replayed)
    for request in replayed:
        assert [*request.emitted, *rest[request.id]] == together[request.id]


def test_the_same_with_drafts(
    together: dict[str, list[int]], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Payoff, "choose", lambda self, running: self.drafts)
    drafted, made = run(requests(tokenizer), draft_tokens=3)
    assert drafted == together
    counters = made.loop.counters
    assert 0 < counters.accepted < counters.drafted


@pytest.mark.slow
def test_the_same_in_every_layout(together: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    for topology in ({"layout": "ep", "attention": 2}, {"stages": 2, "experts": 2}):
        assert run(requests(tokenizer), topology)[0] == together


class Slow:
    """Compiling that takes until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        compiled = grammar_file.compiled

        def wait(*args: Any) -> Any:
            assert self.go.wait(30)
            return compiled(*args)

        monkeypatch.setattr(grammar_file, "compiled", wait)


def settled(made: SingleEngine, steps: int = 200) -> list[TokenEvent]:
    """What comes of so many steps at most, stopping when there is nothing to do."""
    for _ in range(steps):
        if not made.step():
            break
    events, made.events[:] = list(made.events), []
    return events


def test_nobody_waits_for_anothers_grammar(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, todo = Slow(monkeypatch), requests(tokenizer)
    late = Request("late", (0, 5), 9, todo[0].sampling, (1,), timeout_s=0.0)
    with torch.inference_mode():
        made = opened({"layout": "single"})
        for request in (todo[0], todo[2], late, todo[-1]):
            made.loop.submit(request)
        first = settled(made)
        made.loop.cancel(todo[2].id)
        second = settled(made)
        assert made.loop.load == 1
        assert not made.loop.scheduler.busy
        slow.go.set()
        third = list(made.run([]))
    ends = {e.request_id: e.finish for e in (*first, *second, *third) if e.finish}
    assert ends == {
        "free-2": "length",
        "late": "deadline",
        todo[2].id: "abort",
        todo[0].id: "stop",
    }
    assert {e.request_id for e in third} == {todo[0].id}
    assert made.loop.load == 0


def test_what_cannot_be_compiled_or_followed_ends_its_own_request_alone(
    tokenizer: Tokenizer, together: dict[str, list[int]]
) -> None:
    wrong = {
        "open": Grammar("regex", "("),
        "much": Grammar("regex", "(((((a{0,500}){0,500}){0,500}){0,500}){0,500})"),
    }
    todo = requests(tokenizer)
    todo += [
        Request(
            *(name, todo[0].prompt_ids, 50),
            Sampling(0.0, adjust=Adjust(min_tokens=40, stop_ids=(EOS,), grammar=g)),
            (EOS,),
        )
        for name, g in wrong.items()
    ]
    out: dict[str, list[TokenEvent]] = {}
    with torch.inference_mode():
        for event in opened({"layout": "single"}).run(todo):
            out.setdefault(event.request_id, []).append(event)
    assert "unclosed group" in (out["open"][-1].error or "")
    assert "more work" in (out["much"][-1].error or "")
    for name, tokens in together.items():
        assert [e.token for e in out[name]] == tokens
