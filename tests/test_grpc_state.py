"""Health, reflection and binding of the gRPC listener."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import pytest
from edge import TOKENIZER, Edge, failure_of, make_service, with_channel
from engines import Scripted
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from whalepod.errors import ConfigError
from whalepod.ingress.grpc import NAME, GrpcServer
from whalepod.protos import inference_pb2 as pb

Code = grpc.StatusCode
IDS = TOKENIZER.encode_text("The whale swam past")


def test_health_follows_the_engine() -> None:
    async def act(servers: Edge, channel: Any) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        kind = health_pb2.HealthCheckResponse
        for service in ("", NAME):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
            seen = [(await watch.read()).status]
            while seen[-1] != kind.SERVING:
                seen.append((await watch.read()).status)
            servers.engine.reason = "waiting for an expert member"
            assert (await watch.read()).status == kind.NOT_SERVING
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == kind.NOT_SERVING
            servers.engine.reason = None
            assert (await watch.read()).status == kind.SERVING
        found = await failure_of(stub.Check(health_pb2.HealthCheckRequest(service="nothing")))
        assert found.code() is Code.NOT_FOUND

    with_channel(Scripted(IDS), act)


def test_health_survives_an_engine_that_cannot_be_asked() -> None:
    class Mute(Scripted):
        async def ready(self) -> str | None:
            if self.reason == "mute":
                raise ConnectionError("gone")
            return self.reason

    async def act(servers: Edge, channel: Any) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        kind = health_pb2.HealthCheckResponse
        assert (await watch.read()).status == kind.NOT_SERVING
        servers.engine.reason = None
        assert (await watch.read()).status == kind.SERVING

    engine = Mute(IDS)
    engine.reason = "mute"
    with_channel(engine, act)


def test_reflection_names_the_service_and_gives_its_file() -> None:
    async def ask(channel: Any, **request: str) -> Any:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]))
        return await call.read()

    async def act(servers: Edge, channel: Any) -> tuple[Any, Any]:
        listed = await ask(channel, list_services="")
        return listed, await ask(channel, file_containing_symbol=NAME)

    listed, found = with_channel(Scripted(), act)
    names = {s.name for s in listed.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names
    assert pb.DESCRIPTOR.serialized_pb in found.file_descriptor_response.file_descriptor_proto


def test_a_taken_port_is_named() -> None:
    async def act(port: int) -> None:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            GrpcServer(
                make_service(Scripted()), "127.0.0.1", port, max_bytes=1, default_thinking=False
            )

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(act(taken.getsockname()[1]))
