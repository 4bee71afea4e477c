"""The gRPC API over a real socket and a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import pytest
from edge import MAX_BYTES, TOKENIZER, Edge, failure_of, with_channel
from engines import Scripted

from whalepod.engine.request import Adjust
from whalepod.errors import NotReady, Overloaded
from whalepod.ingress.grpc import NAME
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

T = TypeVar("T")
Code = grpc.StatusCode
TEXT = "The whale swam past 鲸 the harbour"
IDS = TOKENIZER.encode_text(TEXT)
GOOD = pb.CompleteRequest(text="x", sampling=pb.Sampling(max_tokens=2))
HELLO = [pb.Message(role=pb.ROLE_USER, content="hi")]


def with_stub(
    engine: Scripted, act: Callable[[Edge, Any], Awaitable[T]], tokenizer: Any = TOKENIZER
) -> T:
    return with_channel(engine, lambda e, c: act(e, pb_grpc.InferenceStub(c)), tokenizer)


def test_completion_whole_and_streamed() -> None:
    request = pb.CompleteRequest(
        model="tiny", text="x", sampling=pb.Sampling(max_tokens=len(IDS), temperature=0)
    )

    async def act(servers: Edge, stub: Any) -> tuple[Any, list[Any]]:
        return await stub.Complete(request), [part async for part in stub.CompleteStream(request)]

    whole, parts = with_stub(Scripted(IDS), act)
    assert whole.text == "".join(p.text for p in parts) == TEXT
    assert list(whole.token_ids) == [t for p in parts for t in p.token_ids] == IDS
    assert whole.finish_reason == parts[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert whole.usage.completion_tokens == len(IDS)
    assert whole.usage == parts[-1].usage
    assert all(p.finish_reason == pb.FINISH_REASON_UNSPECIFIED for p in parts[:-1])
    assert not any(p.HasField("usage") for p in parts[:-1])
    assert len({p.id for p in parts}) == 1


def test_sampling_settings_go_to_the_engine_or_are_refused() -> None:
    engine = Scripted(IDS)
    good = pb.Sampling(
        max_tokens=2, presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.5,
        logit_bias={7: -100}, min_p=0.5, min_tokens=1, allowed_token_ids=[5, 6],
    )  # fmt: skip
    bad = {
        "presence_penalty": pb.Sampling(presence_penalty=3),
        "repetition_penalty": pb.Sampling(repetition_penalty=0),
        "min_p": pb.Sampling(min_p=-1),
        "logit_bias": pb.Sampling(logit_bias={1: 200}),
        "banned_token_ids": pb.Sampling(banned_token_ids=range(1025)),
    }

    async def act(servers: Edge, stub: Any) -> dict[str, str]:
        await stub.Complete(pb.CompleteRequest(text="x", sampling=good))
        told = {}
        for name, sampling in bad.items():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Complete(pb.CompleteRequest(text="x", sampling=sampling))
            assert refused.value.code() == Code.INVALID_ARGUMENT
            told[name] = refused.value.details()
        return told

    for name, text in with_stub(engine, act).items():
        assert name in text
    sampling = engine.requests[0].sampling
    assert sampling.min_p == 0.5
    assert sampling.adjust == Adjust(0.5, -1, 1.5, ((7, -100),), (5, 6), (), 1, (1,))


def test_salt_goes_to_the_engine_and_cached_tokens_come_back() -> None:
    engine = Scripted(IDS)
    engine.cached = 1
    request = pb.CompleteRequest(text="x", sampling=pb.Sampling(max_tokens=2), cache_salt="me")

    async def act(servers: Edge, stub: Any) -> Any:
        return await stub.Complete(request)

    assert with_stub(engine, act).usage.cached_tokens == 1
    assert engine.requests[0].cache_salt == "me"


def test_chat_splits_reasoning_from_the_answer() -> None:
    end, eos = TOKENIZER.control_id("</think>"), 1
    script = [*TOKENIZER.encode_text("hmm, 鲸"), end, *TOKENIZER.encode_text("Yes."), eos, 5]
    request = pb.ChatRequest(messages=HELLO, thinking=True)

    async def act(servers: Edge, stub: Any) -> tuple[Any, list[Any]]:
        return await stub.Chat(request), [part async for part in stub.ChatStream(request)]

    whole, parts = with_stub(Scripted(script), act)
    assert (whole.reasoning_content, whole.content) == ("hmm, 鲸", "Yes.")
    assert whole.finish_reason == pb.FINISH_REASON_STOP
    assert "".join(p.reasoning_content for p in parts) == "hmm, 鲸"
    assert "".join(p.content for p in parts) == "Yes."
    assert list(whole.token_ids) == [t for p in parts for t in p.token_ids] == script[:-1]


def test_settings_reach_the_engine_and_unset_ones_are_defaults() -> None:
    engine = Scripted(IDS)
    sampling = pb.Sampling(
        temperature=0, top_p=0.5, top_k=7, seed=2**64 - 1, stop_token_ids=[9], ignore_eos=True
    )
    asked = pb.CompleteRequest(tokens=pb.TokenIds(ids=[5, 6]), sampling=sampling)

    async def act(servers: Edge, stub: Any) -> None:
        await stub.Complete(asked)
        await stub.Complete(pb.CompleteRequest(text="x"))

    with_stub(engine, act)
    first, second = engine.requests
    assert first.prompt_ids == (5, 6)
    assert (first.sampling.temperature, first.sampling.top_p) == (0, 0.5)
    assert (first.sampling.top_k, first.sampling.seed) == (7, 2**63 - 1)
    assert first.stop_ids == (1, 9)
    assert first.ignore_eos
    assert (second.sampling.temperature, second.sampling.top_p) == (1, 1)
    assert (second.sampling.top_k, second.stop_ids, second.ignore_eos) == (0, (1,), False)
    assert second.max_tokens == 200 - len(second.prompt_ids)


def complete(text: str = "x", model: str = "", ids: Any = None, **sampling: Any) -> bytes:
    request = pb.CompleteRequest(model=model, sampling=pb.Sampling(**sampling))
    if ids is None:
        request.text = text
    else:
        request.tokens.ids.extend(ids)
    return bytes(request.SerializeToString())


def chat(*messages: pb.Message, **sampling: Any) -> bytes:
    request = pb.ChatRequest(messages=messages, sampling=pb.Sampling(**sampling))
    return bytes(request.SerializeToString())


def said(content: str, **fields: Any) -> pb.Message:
    return pb.Message(role=pb.ROLE_ASSISTANT, content=content, **fields)


BAD = [
    ("Complete", b"", Code.INVALID_ARGUMENT, "input: input is missing; set text or tokens"),
    ("Complete", complete(""), Code.INVALID_ARGUMENT, "input: the prompt is empty"),
    ("Complete", complete(ids=[]), Code.INVALID_ARGUMENT, "input: the prompt is empty"),
    ("Complete", complete(ids=[5, 1024]), Code.INVALID_ARGUMENT, "input: token id 1024 is outside"),
    ("Complete", complete(ids=[2**32 - 1]), Code.INVALID_ARGUMENT, "input: token id 4294967295"),
    ("Complete", complete(ids=[5] * 200), Code.INVALID_ARGUMENT, "input: the prompt has 200"),
    ("Complete", complete("word " * 400), Code.INVALID_ARGUMENT, "the context holds 200"),
    ("Complete", complete(max_tokens=0), Code.INVALID_ARGUMENT, "sampling.max_tokens: "),
    ("Complete", complete(max_tokens=200), Code.INVALID_ARGUMENT, "sampling.max_tokens: "),
    ("Complete", complete(max_tokens=2**32 - 1), Code.INVALID_ARGUMENT, "ask for at most"),
    ("Complete", complete(temperature=-0.5), Code.INVALID_ARGUMENT, "sampling.temperature: "),
    ("Complete", complete(temperature=2.5), Code.INVALID_ARGUMENT, "2.5; expected 0 to 2"),
    ("Complete", complete(temperature=float("nan")), Code.INVALID_ARGUMENT, "is nan; expected"),
    ("Complete", complete(temperature=float("inf")), Code.INVALID_ARGUMENT, "is inf; expected"),
    ("Complete", complete(top_p=0), Code.INVALID_ARGUMENT, "sampling.top_p: top_p is 0"),
    ("Complete", complete(top_p=1.5), Code.INVALID_ARGUMENT, "above 0, at most 1"),
    ("Complete", complete(stop=[""]), Code.INVALID_ARGUMENT, "sampling.stop: "),
    ("Complete", complete(stop=["a"] * 17), Code.INVALID_ARGUMENT, "at most 16 strings"),
    ("Complete", complete(stop_token_ids=[1024]), Code.INVALID_ARGUMENT, "sampling.stop_token_ids"),
    ("Complete", complete(stop_token_ids=[1] * 129), Code.INVALID_ARGUMENT, "at most 128 ids"),
    ("Complete", complete(model="gpt"), Code.NOT_FOUND, "'gpt' is not served here; use 'tiny'"),
    ("Complete", complete(model="g" * 50_000), Code.NOT_FOUND, "use 'tiny'"),
    ("Complete", b"\x12\x02\xff\xfe", Code.INVALID_ARGUMENT, "bad UTF-8"),
    ("Complete", b"\xff\xff", Code.INVALID_ARGUMENT, "no protobuf message of this RPC"),
    ("Complete", b"x" * (MAX_BYTES + 1), Code.INVALID_ARGUMENT, f"{MAX_BYTES} are allowed"),
    ("Complete", b"x" * 20_000_000, Code.RESOURCE_EXHAUSTED, "larger than max"),
    ("Chat", chat(), Code.INVALID_ARGUMENT, "messages: messages is empty"),
    ("Chat", chat(pb.Message(content="x")), Code.INVALID_ARGUMENT, "messages: role 0"),
    ("Chat", chat(pb.Message(role=9, content="x")), Code.INVALID_ARGUMENT, "messages: role 9"),  # type: ignore[arg-type]
    ("Chat", chat(*HELLO, said("x")), Code.INVALID_ARGUMENT, "messages: the last message"),
    ("Chat", chat(said("x", prefix=True)), Code.INVALID_ARGUMENT, "no user message"),
    (
        "Chat",
        chat(pb.Message(role=pb.ROLE_SYSTEM, content="S")),
        Code.INVALID_ARGUMENT,
        "no user message",
    ),
    ("Chat", chat(*HELLO, max_tokens=0), Code.INVALID_ARGUMENT, "sampling.max_tokens: "),
    ("Chat", b"\xff\xff", Code.INVALID_ARGUMENT, "no protobuf message"),
    ("ListModels", b"\xff\xff", Code.INVALID_ARGUMENT, "no protobuf message"),
    ("Nothing", b"", Code.UNIMPLEMENTED, ""),
]


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_requests_are_explained_and_the_server_goes_on(streamed: bool) -> None:
    async def act(servers: Edge, channel: Any) -> None:
        good = pb_grpc.InferenceStub(channel)
        for method, message, code, fact in BAD:
            if streamed and method not in ("Complete", "Chat"):
                continue
            path = f"/{NAME}/{method}{'Stream' if streamed else ''}"
            kind = channel.unary_stream if streamed else channel.unary_unary
            found = await failure_of(kind(path)(message))
            assert found.code() is code, (method, message[:80], found)
            assert fact in found.details(), (method, message[:80], found)
            answer = await good.Complete(GOOD)
            assert answer.finish_reason == pb.FINISH_REASON_LENGTH

    with_channel(Scripted(IDS), act)


@pytest.mark.parametrize("method", ["Complete", "CompleteStream"])
@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (Overloaded("the queue is full", 2.5), Code.RESOURCE_EXHAUSTED, "the queue is full"),
        (NotReady("no member serves"), Code.UNAVAILABLE, "no member serves"),
        (ZeroDivisionError("secret"), Code.INTERNAL, "the server failed (ZeroDivisionError)"),
    ],
)
def test_engine_faults_have_their_own_code_and_no_traceback(
    method: str, failure: Exception, code: Any, says: str
) -> None:
    async def act(servers: Edge, stub: Any) -> Any:
        return await failure_of(getattr(stub, method)(GOOD))

    engine = Scripted(IDS)
    engine.failure = failure
    error = with_stub(engine, act)
    assert error.code() is code
    assert says in error.details()
    assert "secret" not in error.details()
    assert "Traceback" not in error.details()
    if isinstance(failure, Overloaded):
        assert dict(error.trailing_metadata())["retry-after"] == "3"


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    async def act(servers: Edge, stub: Any) -> Any:
        for call in (stub.Complete(GOOD), stub.Chat(pb.ChatRequest(messages=HELLO))):
            found = await failure_of(call)
            assert found.code() is Code.INVALID_ARGUMENT
            assert "send the prompt as token ids" in found.details()
        return await stub.Complete(pb.CompleteRequest(tokens=pb.TokenIds(ids=[5])))

    whole = with_stub(Scripted([7, 8, 1, 9]), act, tokenizer=None)
    assert list(whole.token_ids) == [7, 8, 1]
    assert whole.text == ""


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
@pytest.mark.parametrize("method", ["Complete", "CompleteStream"])
def test_a_client_that_goes_away_cancels_its_request(how: str, method: str) -> None:
    request = pb.CompleteRequest(text="x", sampling=pb.Sampling(max_tokens=150))

    async def act(servers: Edge, channel: Any) -> None:
        stub = pb_grpc.InferenceStub(channel)
        call = getattr(stub, method)(request, timeout=0.3 if how == "deadline" else 20)
        if method == "CompleteStream":
            await call.read()
        else:
            while not servers.engine.requests:
                await asyncio.sleep(0.005)
        if how == "cancel":
            call.cancel()
        elif how == "close":
            await channel.close()
        await servers.until_cancelled()
        if how == "deadline":
            assert await call.code() is Code.DEADLINE_EXCEEDED

    with_channel(Scripted(IDS * 50, pause_s=0.02), act)


def test_models_are_listed() -> None:
    async def act(servers: Edge, stub: Any) -> Any:
        return await stub.ListModels(pb.ListModelsRequest())

    (model,) = with_stub(Scripted(), act).models
    assert (model.id, model.max_context) == ("tiny", 200)
