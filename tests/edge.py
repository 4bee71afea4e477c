"""Both servers on loopback ports over a scripted engine, for tests with real clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import pytest
from engines import Scripted

from whalepod.ingress.grpc import GrpcServer
from whalepod.ingress.http import make_app
from whalepod.ingress.listener import HttpListener
from whalepod.ingress.service import Service
from whalepod.metrics import Metrics
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny import preset_config
from whalepod.model.tiny_tokenizer import small_tokenizer
from whalepod.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer(small_tokenizer(1024))
MODEL = ModelConfig.from_dict(preset_config("tiny"))
MAX_CONTEXT, MAX_BYTES = 200, 100_000
T = TypeVar("T")


@dataclass
class Edge:
    """Where the servers listen, and what stands behind them."""

    http: str
    grpc: str
    engine: Scripted
    service: Service

    async def until_cancelled(self, count: int = 1) -> None:
        """Wait until the engine has been told to stop `count` requests."""
        async with asyncio.timeout(5):
            while len(self.engine.cancelled) < count:
                await asyncio.sleep(0.005)


def make_service(engine: Scripted, tokenizer: Tokenizer | None = TOKENIZER) -> Service:
    return Service(engine, tokenizer, "tiny", MODEL, MAX_CONTEXT, Metrics("tiny"))


@asynccontextmanager
async def edge(
    engine: Scripted, tokenizer: Tokenizer | None = TOKENIZER, *, http: bool = True
) -> AsyncIterator[Edge]:
    """Serve gRPC, and HTTP where it is wanted."""
    service = make_service(engine, tokenizer)
    listener = GrpcServer(service, "127.0.0.1", 0, max_bytes=MAX_BYTES, default_thinking=False)
    await listener.start()
    try:
        async with _http(service) if http else nullcontext("") as url:
            yield Edge(url, f"127.0.0.1:{listener.port}", engine, service)
    finally:
        await listener.stop(0)


@asynccontextmanager
async def _http(service: Service) -> AsyncIterator[str]:
    app = make_app(service, max_body_bytes=MAX_BYTES, default_thinking=False)
    listener = HttpListener(app, "127.0.0.1", 0)
    await listener.start()
    try:
        yield f"http://127.0.0.1:{listener.port}"
    finally:
        await listener.stop(0)


def served(engine: Scripted, act: Callable[[Edge], Awaitable[T]]) -> T:
    async def run() -> T:
        async with edge(engine) as servers, asyncio.timeout(30):
            return await act(servers)

    return asyncio.run(run())


def with_channel(
    engine: Scripted, act: Callable[[Edge, Any], Awaitable[T]], tokenizer: Any = TOKENIZER
) -> T:
    async def run() -> T:
        async with (
            edge(engine, tokenizer, http=False) as servers,
            grpc.aio.insecure_channel(servers.grpc) as channel,
            asyncio.timeout(20),
        ):
            return await act(servers, channel)

    return asyncio.run(run())


async def failure_of(call: Any) -> Any:
    """The error that ends a call."""
    with pytest.raises(grpc.RpcError) as failure:
        await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return failure.value
