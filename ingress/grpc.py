"""gRPC: `whalepod.v1.Inference`, health and reflection, over one `Service`.

The ingress runs its own server, since Ray Serve's gRPC proxy can listen on all interfaces only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from whalepod.errors import ConfigError, DeadlineExceeded, NotReady, Overloaded, RequestError
from whalepod.ingress.generation import EngineFailed
from whalepod.ingress.messages import (
    Place,
    chat_of,
    completion_of,
    field_name,
    message_of,
    options_of,
    prompt_of,
    sum_up,
)
from whalepod.ingress.service import Service, UnknownModel
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)
NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_READY_S = 0.5
# Above the limit there is an answer with a sentence; far above it the transport refuses.
_TRANSPORT_FACTOR = 4
# Longer than anybody waits: some clients send such a deadline for none.
_NO_DEADLINE_S = 1e8


class Servicer(pb_grpc.InferenceServicer):
    """The RPCs."""

    def __init__(self, service: Service, default_thinking: bool) -> None:
        self._service, self._thinking = service, default_thinking

    async def Complete(self, request: Any, context: Any) -> Any:
        """One message when all is done."""
        async with aclosing(_guarded(self._complete(request, context), context)) as parts:
            return await sum_up(parts, pb.CompleteResponse)

    async def CompleteStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Messages as text comes."""
        async with aclosing(_guarded(self._complete(request, context), context)) as parts:
            async for part in parts:
                yield part

    async def Chat(self, request: Any, context: Any) -> Any:
        """One message when all is done."""
        async with aclosing(_guarded(self._chat(request, context), context)) as parts:
            return await sum_up(parts, pb.ChatResponse)

    async def ChatStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Messages as text comes."""
        async with aclosing(_guarded(self._chat(request, context), context)) as parts:
            async for part in parts:
                yield part

    async def ListModels(self, request: Any, context: Any) -> Any:
        """What is served."""
        if isinstance(request, Unreadable):
            await _abort(context, RequestError(request.why))
        model = pb.Model(id=self._service.model_name, max_context=self._service.max_context)
        return pb.ListModelsResponse(models=[model])

    async def _complete(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        service = self._service
        with service.admission():
            _check_readable(request)
            service.check_model(request.model)
            options = options_of(request, time_left(context))
            ids = await service.encode_prompt(prompt_of(request))
            generation = service.complete(ids, options)
        place = Place(generation, options.n)
        async with aclosing(generation.deltas) as deltas:
            async for delta in deltas:
                yield completion_of(delta, place)

    async def _chat(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        service = self._service
        with service.admission():
            _check_readable(request)
            service.check_model(request.model)
            options = options_of(request, time_left(context))
            thinking = request.thinking if request.HasField("thinking") else self._thinking
            ids = await service.encode_chat([message_of(m) for m in request.messages], thinking)
            generation = service.chat(ids, options)
        place = Place(generation, options.n)
        async with aclosing(generation.deltas) as deltas:
            async for delta in deltas:
                yield chat_of(delta, place)


async def _guarded(parts: AsyncGenerator[Any, None], context: Any) -> AsyncGenerator[Any, None]:
    """Turn our errors into status codes; INTERNAL never carries a traceback."""
    async with aclosing(parts):
        try:
            async for part in parts:
                yield part
        except Exception as error:
            await _abort(context, error)


async def _abort(context: Any, error: Exception) -> None:
    code, text = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log.exception("an RPC failed")
    if isinstance(error, Overloaded):
        context.set_trailing_metadata(_come_back(error.retry_after_s))
    await context.abort(code, text)


def time_left(context: Any) -> float | None:
    """Seconds to the deadline that the client set, None where it set none."""
    left: float | None = context.time_remaining()
    return left if left is not None and left < _NO_DEADLINE_S else None


def _come_back(seconds: float) -> tuple[tuple[str, str], ...]:
    """When to send again: in HTTP's words, and in those that gRPC's own retries listen to."""
    pushback = ("grpc-retry-pushback-ms", str(math.ceil(seconds * 1000)))
    return ("retry-after", str(math.ceil(seconds))), pushback


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status code and details of an exception."""
    if isinstance(error, UnknownModel):
        return grpc.StatusCode.NOT_FOUND, str(error)
    if isinstance(error, RequestError):
        where = f"{field_name(error.param)}: " if error.param else ""
        return grpc.StatusCode.INVALID_ARGUMENT, f"{where}{error}"
    if isinstance(error, Overloaded):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
    if isinstance(error, (NotReady, EngineFailed)):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    text = f"the server failed ({type(error).__name__}); the fault is in its log"
    return grpc.StatusCode.INTERNAL, text


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in for a request that is too large or no message; `why` is for its sender."""

    why: str


def _check_readable(request: Any) -> None:
    if isinstance(request, Unreadable):
        raise RequestError(request.why)


class Reader(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Reads our requests so that a bad one gets INVALID_ARGUMENT and a sentence.

    By itself grpc answers UNKNOWN, with the name of a Python class, when bytes are no message.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """Replace the deserializer of our own methods."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{NAME}/"):
            return handler
        parse = handler.request_deserializer

        def read(data: bytes) -> Any:
            if len(data) > self._limit:
                return Unreadable(
                    f"the request has {len(data)} bytes and {self._limit} are allowed; "
                    "send a smaller one"
                )
            try:
                return parse(data)
            except Exception as error:
                return Unreadable(f"the request is no protobuf message of this RPC: {error}")

        return handler._replace(request_deserializer=read)


class GrpcServer:
    """A listening server and the task that keeps its health status."""

    def __init__(
        self, service: Service, host: str, port: int, *, max_bytes: int, default_thinking: bool
    ) -> None:
        self._service, self._health = service, health.aio.HealthServicer()
        options = [
            ("grpc.max_receive_message_length", _TRANSPORT_FACTOR * max_bytes),
            # Ingress replicas of one node share the port; the kernel spreads connections.
            ("grpc.so_reuseport", 1),
        ]
        self._server = grpc.aio.server(options=options, interceptors=[Reader(max_bytes)])
        pb_grpc.add_InferenceServicer_to_server(Servicer(service, default_thinking), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen on {host}:{port} ({error}); set server.grpc_port"
            ) from None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen."""
        # Until the engine has been asked nobody may take the library's default, SERVING, for true.
        for name in ("", NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        self._watch = asyncio.create_task(self._keep_health())

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new RPCs, let running ones finish for a while, then end."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self._watch is not None:
            self._watch.cancel()

    async def _keep_health(self) -> None:
        kind = health_pb2.HealthCheckResponse
        while True:
            status = kind.SERVING if await self._service.ready() is None else kind.NOT_SERVING
            for name in ("", NAME):
                await self._health.set(name, status)
            await asyncio.sleep(_READY_S)
