"""Structured output over HTTP and gRPC: what reaches the engine, and what is refused."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from edge import TOKENIZER, Edge, failure_of, with_channel
from engines import Scripted
from test_http import CHAT, COMPLETIONS, ask

from whalepod.engine.request import Grammar
from whalepod.engine.trial import Trial
from whalepod.errors import RequestError
from whalepod.ingress.structured import text_of
from whalepod.model.chat import END_THINK
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

IDS = TOKENIZER.encode_text("yes")
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
OBJECT = Grammar("json", '{"type":"object"}')
# Enough rules in a row to exhaust the library's stack, which ends its process.
CHAIN = "start: x0\n" + "\n".join(f'x{i}:x{i + 1}|"a"' for i in range(999)) + '\nx999: "b"'


def grammars(engine: Scripted) -> list[Grammar | None]:
    return [r.sampling.adjust and r.sampling.adjust.grammar for r in engine.requests]


def test_http_says_what_the_text_has_to_be() -> None:
    engine = Scripted(IDS)
    outputs: list[tuple[dict[str, Any], Grammar | None]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar("json", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json", TEXT)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json", TEXT)),
        ({"structured_outputs": {"json_object": True}}, OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "é"]}}, Grammar("choice", '["a", "\\u00e9"]')),
        (
            {"structured_outputs": {"grammar": 'root ::= "a"'}},
            Grammar("grammar", 'root ::= "a"'),
        ),
    ]
    message = {"messages": [{"role": "user", "content": "hi"}]}
    calls = [(CHAT, {**message, **fields}) for fields, _ in outputs]
    calls += [(COMPLETIONS, {"prompt": "x", **fields}) for fields, _ in outputs]
    assert {r.status_code for r in ask(engine, *calls)} == {200}
    assert grammars(engine) == [g for _, g in outputs] * 2


def test_a_thinking_model_thinks_freely_first() -> None:
    engine = Scripted(IDS)
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": "enabled"},
        "response_format": {"type": "json_object"},
    }
    assert ask(engine, (CHAT, body))[0].status_code == 200
    after = TOKENIZER.control_id(END_THINK)
    assert grammars(engine) == [Grammar("json", OBJECT.text, after)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no schema": ({"response_format": {"type": "json_schema"}}, "has no json_schema"),
    "no type": ({"response_format": {}}, "response_format.type is missing"),
    "unknown type": ({"response_format": {"type": "xml"}}, "'json_object'"),
    "schema without type": (
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        "use type json_schema",
    ),
    "bad schema": ({"structured_outputs": {"json": {"type": "wrong"}}}, "Invalid type: wrong"),
    "unknown keyword": ({"structured_outputs": {"json": {"if": {}}}}, "Unimplemented keys"),
    "schema is no JSON": ({"structured_outputs": {"json": "{"}}, "is no JSON"),
    "bad regex": ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    "look-around": ({"structured_outputs": {"regex": "(?!a)b"}}, "look-around"),
    "repeats": ({"structured_outputs": {"regex": "a{100000}"}}, "it may 1000 times"),
    "bad grammar": ({"structured_outputs": {"grammar": "start: x"}}, "unknown name"),
    "endless": ({"structured_outputs": {"grammar": "start: start"}}, "cannot be used"),
    "deep": ({"structured_outputs": {"regex": "(" * 3000 + ")" * 3000}}, "cannot be used"),
    "no choice": ({"structured_outputs": {"choice": [""]}}, "none of them empty"),
    "nothing": ({"structured_outputs": {}}, "set exactly one of"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "choice and regex"),
    "unknown": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml is not known"),
    "both": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "leave one out",
    ),
    "ignore_eos": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "leave one out"),
}


def test_bad_ones_are_refused_with_a_reason() -> None:
    engine = Scripted(IDS)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    calls = [(CHAT, {**chat, **fields}) for fields, _ in BAD.values()]
    calls += [(CHAT, {**chat, **fields, "stream": True}) for fields, _ in BAD.values()]
    for (name, (_, fact)), got in zip(
        [*BAD.items(), *BAD.items()], ask(engine, *calls), strict=True
    ):
        assert got.status_code == 400, name
        assert fact in got.json()["error"]["message"], name
    assert engine.requests == []


def test_a_text_has_a_greatest_length() -> None:
    assert text_of("regex", "é" * 8192, "x") == Grammar("regex", "é" * 8192)
    for wrong in ("é" * 8193, "a\0", "\ud800"):
        with pytest.raises(RequestError, match="the regex h"):
            text_of("regex", wrong, "x")


def test_without_a_tokenizer_there_is_none() -> None:
    body = {"prompt": [5, 6], "structured_outputs": {"regex": "a"}}
    (got,) = ask(Scripted(IDS), (COMPLETIONS, body), tokenizer=None)
    assert got.status_code == 400
    assert "has no tokenizer" in got.json()["error"]["message"]


def test_grpc_says_it_too() -> None:
    engine = Scripted(IDS)
    good = [
        (pb.StructuredOutput(json_schema=TEXT), Grammar("json", TEXT)),
        (pb.StructuredOutput(json_object=True), OBJECT),
        (pb.StructuredOutput(regex="a+"), Grammar("regex", "a+")),
        (
            pb.StructuredOutput(choice=pb.StructuredOutput.Choices(texts=["a", "b"])),
            Grammar("choice", '["a", "b"]'),
        ),
        (pb.StructuredOutput(grammar='start: "a"'), Grammar("grammar", 'start: "a"')),
    ]
    bad = [
        (pb.StructuredOutput(), "structured_output is empty"),
        (pb.StructuredOutput(json_schema='{"type": 7}'), "JSON schema cannot be"),
        (pb.StructuredOutput(regex="(a"), "unclosed group"),
        (pb.StructuredOutput(choice=pb.StructuredOutput.Choices()), "none of them empty"),
        (pb.StructuredOutput(grammar="start: x"), "unknown name"),
    ]

    def request(output: pb.StructuredOutput) -> pb.CompleteRequest:
        return pb.CompleteRequest(text="x", sampling=pb.Sampling(structured_output=output))

    async def act(servers: Edge, channel: Any) -> list[Any]:
        stub = pb_grpc.InferenceStub(channel)
        for output, _ in good:
            await stub.Complete(request(output))
        return [await failure_of(stub.Complete(request(output))) for output, _ in bad]

    failures = with_channel(engine, act)
    assert grammars(engine) == [g for _, g in good]
    for (_, fact), failure in zip(bad, failures, strict=True):
        assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert fact in failure.details()


def test_what_ends_the_library_ends_a_process_apart() -> None:
    trial = Trial(TOKENIZER.data, 1024, 1, limit_s=20)
    with pytest.raises(RequestError, match="or too much memory; simplify it"):
        trial.check(Grammar("grammar", CHAIN)).result()
    trial.check(Grammar("regex", "a+")).result()


def test_what_takes_too_long_is_stopped() -> None:
    trial = Trial(TOKENIZER.data, 1024, 1, limit_s=0.0)
    with pytest.raises(RequestError, match="took more than 0 s"):
        trial.check(Grammar("regex", "a+")).result()


def test_streams_go_on_while_a_grammar_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(servers: Edge, channel: Any) -> list[str]:
        stub, order = pb_grpc.InferenceStub(channel), []
        trial = servers.service.trial
        assert trial is not None
        tried: Future[None] = Future()
        monkeypatch.setattr(trial, "check", lambda grammar: tried)

        async def one(name: str, **fields: Any) -> None:
            await stub.Complete(pb.CompleteRequest(text="x", sampling=pb.Sampling(**fields)))
            order.append(name)

        slow = asyncio.create_task(one("slow", structured_output=pb.StructuredOutput(regex="a")))
        await asyncio.sleep(0.05)
        await one("other")
        tried.set_result(None)
        await slow
        return order

    assert with_channel(Scripted(IDS), act) == ["other", "slow"]
