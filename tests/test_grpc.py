"""The gRPC service on a loopback socket, over a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from engines import Scripted
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from test_http import IDS, TEXT, TOKENIZER, service

from whalepod.errors import NotReady, Overloaded
from whalepod.ingress.grpc import NAME, GrpcServer
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

LIMIT = 10_000


def served(engine: Scripted, body: Callable[[grpc.aio.Channel], Awaitable[None]]) -> None:
    async def run() -> None:
        server = GrpcServer(
            service(engine), "127.0.0.1", 0, max_bytes=LIMIT, default_thinking=False
        )
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                await asyncio.wait_for(body(channel), 20)
        finally:
            await server.stop(0)

    asyncio.run(run())


def request(**sampling: Any) -> Any:
    return pb.CompleteRequest(
        text="x", sampling=pb.Sampling(**{"max_tokens": len(IDS), **sampling})
    )


def test_complete_and_stream() -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        stub = pb_grpc.InferenceStub(channel)
        whole = await stub.Complete(request())
        assert whole.text == TEXT
        assert list(whole.token_ids) == IDS
        assert whole.finish_reason == pb.FINISH_REASON_LENGTH
        assert whole.usage.completion_tokens == len(IDS)
        parts = [part async for part in stub.CompleteStream(request())]
        assert "".join(p.text for p in parts) == TEXT
        assert [t for p in parts for t in p.token_ids] == IDS
        assert [p.finish_reason for p in parts[:-1]] == [0] * (len(parts) - 1)
        assert parts[-1].usage == whole.usage
        stopped = await stub.Complete(request(stop=["past"]))
        assert (stopped.text, stopped.finish_reason) == ("The whale swam ", pb.FINISH_REASON_STOP)
        models = (await stub.ListModels(pb.ListModelsRequest())).models
        assert [(m.id, m.max_context) for m in models] == [("tiny", 200)]

    served(Scripted(IDS), body)


def test_chat() -> None:
    script = [*TOKENIZER.encode_text("hm"), TOKENIZER.control_id("</think>"), *IDS, 1]

    async def body(channel: grpc.aio.Channel) -> None:
        stub = pb_grpc.InferenceStub(channel)
        messages = [pb.Message(role=pb.ROLE_USER, content="?")]
        answer = await stub.Chat(pb.ChatRequest(messages=messages, thinking=True))
        assert (answer.reasoning_content, answer.content) == ("hm", TEXT)
        assert answer.finish_reason == pb.FINISH_REASON_STOP

    served(Scripted(script), body)


USER = pb.Message(role=pb.ROLE_USER, content="x")
BAD: list[tuple[str, Any, grpc.StatusCode, str]] = [
    ("Complete", pb.CompleteRequest(), grpc.StatusCode.INVALID_ARGUMENT, "input is missing"),
    ("Complete", pb.CompleteRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty"),
    (
        "Complete",
        pb.CompleteRequest(tokens=pb.TokenIds()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "empty",
    ),
    (
        "Complete",
        pb.CompleteRequest(tokens=pb.TokenIds(ids=[1024])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "1024 is outside the vocabulary",
    ),
    (
        "Complete",
        pb.CompleteRequest(tokens=pb.TokenIds(ids=[5] * 300)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "300 tokens",
    ),
    ("Complete", request(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is 0"),
    ("Complete", request(max_tokens=500), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens 500"),
    ("Complete", request(temperature=-1), grpc.StatusCode.INVALID_ARGUMENT, "temperature is -1"),
    (
        "Complete",
        request(temperature=float("nan")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "temperature",
    ),
    ("Complete", request(top_p=0), grpc.StatusCode.INVALID_ARGUMENT, "top_p is 0"),
    ("Complete", request(top_p=1.5), grpc.StatusCode.INVALID_ARGUMENT, "top_p is 1.5"),
    ("Complete", request(stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop takes at most 16"),
    (
        "Complete",
        request(stop=["a"] * 17),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stop takes at most 16",
    ),
    ("Complete", pb.CompleteRequest(model="gpt", text="x"), grpc.StatusCode.NOT_FOUND, "'gpt'"),
    (
        "Complete",
        pb.CompleteRequest(text="x" * LIMIT),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger",
    ),
    ("Chat", pb.ChatRequest(), grpc.StatusCode.INVALID_ARGUMENT, "messages is empty"),
    (
        "Chat",
        pb.ChatRequest(messages=[pb.Message(content="x")]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "role 0 is unknown",
    ),
    (
        "Chat",
        pb.ChatRequest(messages=[USER, pb.Message(role=pb.ROLE_ASSISTANT, content="y")]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prefix: true",
    ),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
def test_bad_requests_have_codes_and_the_server_goes_on(streaming: bool) -> None:
    async def body(channel: grpc.aio.Channel) -> None:
        stub = pb_grpc.InferenceStub(channel)
        for method, bad, code, fact in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as failure:  # noqa: PT012
                if streaming:
                    async for _ in getattr(stub, f"{method}Stream")(bad):
                        pass
                else:
                    await getattr(stub, method)(bad)
            assert failure.value.code() is code, bad
            assert fact in (failure.value.details() or "")
            assert (await stub.Complete(request())).text == TEXT

    served(Scripted(IDS), body)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Overloaded("full", 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NotReady("nobody"), grpc.StatusCode.UNAVAILABLE),
        (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
def test_engine_faults_have_codes_and_no_traceback(
    failure: Exception, code: grpc.StatusCode
) -> None:
    engine = Scripted(IDS)
    engine.failure = failure

    async def body(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pb_grpc.InferenceStub(channel).Complete(request())
        assert error.value.code() is code
        assert "secret" not in (error.value.details() or "")

    served(engine, body)


def test_deadlines_and_cancellation_reach_the_engine() -> None:
    engine = Scripted(IDS * 100, pause_s=0.02)

    async def body(channel: grpc.aio.Channel) -> None:
        stub = pb_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Complete(request(max_tokens=150), timeout=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        call = stub.CompleteStream(request(max_tokens=150))
        async for _ in call:
            call.cancel()
            break
        while len(engine.cancelled) < 2:
            await asyncio.sleep(0.01)

    served(engine, body)


def test_health_follows_readiness_and_reflection_lists_the_service() -> None:
    engine = Scripted(IDS)

    async def body(channel: grpc.aio.Channel) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        statuses = health_pb2.HealthCheckResponse

        async def check(name: str) -> Any:
            return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

        while await check(NAME) != statuses.SERVING:
            await asyncio.sleep(0.02)
        assert await check("") == statuses.SERVING
        engine.reason = "an epoch"
        while await check("") != statuses.NOT_SERVING:
            await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check("other.Service")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([asked])):
            names = {s.name for s in reply.list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names

    served(engine, body)
