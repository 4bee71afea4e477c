"""gRPC: `whalepod.v1.Inference`, health and reflection, over one `Service`.

The ingress runs its own server, since Ray Serve's gRPC proxy can listen on all interfaces only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from whalepod.errors import ConfigError, NotReady, Overloaded, RequestError
from whalepod.ingress.service import Delta, Generation, Options, Service, UnknownModel
from whalepod.model.chat import Message
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)
NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
_READY_S = 0.5


class Servicer(pb_grpc.InferenceServicer):
    """The RPCs."""

    def __init__(self, service: Service, default_thinking: bool) -> None:
        self._service, self._thinking = service, default_thinking

    async def Complete(self, request: Any, context: Any) -> Any:
        """One message when all is done."""
        return await _whole(self.CompleteStream(request, context), pb.CompleteResponse)

    async def CompleteStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Messages as text comes."""
        async with aclosing(self._complete(request)) as deltas:
            async for response in _guarded(deltas, context):
                yield response

    async def Chat(self, request: Any, context: Any) -> Any:
        """One message when all is done."""
        return await _whole(self.ChatStream(request, context), pb.ChatResponse)

    async def ChatStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Messages as text comes."""
        async with aclosing(self._chat(request)) as deltas:
            async for response in _guarded(deltas, context):
                yield response

    async def ListModels(self, request: Any, context: Any) -> Any:
        """What is served."""
        model = pb.Model(id=self._service.model_name, max_context=self._service.max_context)
        return pb.ListModelsResponse(models=[model])

    async def _complete(self, request: Any) -> AsyncGenerator[Any, None]:
        service = self._service
        service.check_model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestError("input is missing; set text or tokens", "input")
        prompt = request.text if kind == "text" else list(request.tokens.ids)
        generation = service.complete(service.encode_prompt(prompt), _options(request.sampling))
        async with aclosing(generation.deltas) as deltas:
            async for delta in deltas:
                yield pb.CompleteResponse(
                    id=generation.id, text=delta.content, **_common(delta, generation)
                )

    async def _chat(self, request: Any) -> AsyncGenerator[Any, None]:
        service = self._service
        service.check_model(request.model)
        thinking = request.thinking if request.HasField("thinking") else self._thinking
        ids = service.encode_chat([_message(m) for m in request.messages], thinking)
        generation = service.chat(ids, _options(request.sampling), thinking)
        async with aclosing(generation.deltas) as deltas:
            async for delta in deltas:
                yield pb.ChatResponse(
                    id=generation.id,
                    content=delta.content,
                    reasoning_content=delta.reasoning,
                    **_common(delta, generation),
                )


class EngineEnded(Exception):
    """The engine ended a request with an error."""


async def _guarded(responses: AsyncGenerator[Any, None], context: Any) -> AsyncGenerator[Any, None]:
    """Turn our errors into status codes; INTERNAL never carries a traceback."""
    try:
        async for response in responses:
            yield response
    except Exception as error:
        code, text = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            log.exception("an RPC failed")
        await context.abort(code, text)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status code and details of an exception."""
    if isinstance(error, UnknownModel):
        return grpc.StatusCode.NOT_FOUND, str(error)
    if isinstance(error, RequestError):
        where = f"{error.param}: " if error.param else ""
        return grpc.StatusCode.INVALID_ARGUMENT, f"{where}{error}"
    if isinstance(error, Overloaded):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, NotReady):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    if isinstance(error, EngineEnded):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    text = f"the server failed ({type(error).__name__}); the fault is in its log"
    return grpc.StatusCode.INTERNAL, text


async def _whole(responses: AsyncIterator[Any], kind: Any) -> Any:
    """Add streamed messages up to one."""
    total = kind()
    texts = {f.name: list[str]() for f in kind.DESCRIPTOR.fields if f.name in _TEXT}
    async for response in responses:
        for name, parts in texts.items():
            parts.append(getattr(response, name))
        total.token_ids.extend(response.token_ids)
        total.id, total.finish_reason = response.id, response.finish_reason
        if response.HasField("usage"):
            total.usage.CopyFrom(response.usage)
    for name, parts in texts.items():
        setattr(total, name, "".join(parts))
    return total


_TEXT = ("text", "content", "reasoning_content")


def _common(delta: Delta, generation: Generation) -> dict[str, Any]:
    if delta.finish == "error":
        raise EngineEnded(delta.error or "the request was ended")
    fields: dict[str, Any] = {"token_ids": delta.tokens}
    if delta.finish is not None:
        used = generation.usage
        fields["finish_reason"] = _FINISH[delta.finish]
        fields["usage"] = pb.Usage(
            prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens
        )
    return fields


def _options(sampling: Any) -> Options:
    def given(name: str, default: Any) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else default

    options = Options(
        max_tokens=given("max_tokens", None),
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=given("top_k", 0),
        seed=given("seed", None),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )
    if not 0 <= options.temperature <= 2:
        raise _out_of("temperature", options.temperature, "0 to 2")
    if not 0 < options.top_p <= 1:
        raise _out_of("top_p", options.top_p, "above 0, at most 1")
    if options.max_tokens == 0:
        raise _out_of("max_tokens", 0, "at least 1")
    if len(options.stop) > 16 or "" in options.stop:
        raise RequestError("stop takes at most 16 strings, none of them empty", "sampling.stop")
    return options


def _out_of(name: str, value: float, expected: str) -> RequestError:
    return RequestError(f"{name} is {value:g}; expected {expected}", f"sampling.{name}")


def _message(message: Any) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(
            f"role {message.role} is unknown; use ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT",
            "messages",
        )
    assert role in ("system", "user", "assistant")
    return Message(role, message.content, message.reasoning_content, message.prefix)  # type: ignore[arg-type]


class GrpcServer:
    """A listening server and the task that keeps its health status."""

    def __init__(
        self, service: Service, host: str, port: int, *, max_bytes: int, default_thinking: bool
    ) -> None:
        self._service, self._health = service, health.aio.HealthServicer()
        options = [
            ("grpc.max_receive_message_length", max_bytes),
            # Ingress replicas of one node share the port; the kernel spreads connections.
            ("grpc.so_reuseport", 1),
        ]
        self._server = grpc.aio.server(options=options)
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
        await self._server.start()
        self._watch = asyncio.create_task(self._keep_health())

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new RPCs, let running ones finish for a while, then end."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self._watch is not None:
            self._watch.cancel()

    async def _keep_health(self) -> None:
        said = None
        while True:
            ready = await self._service.client.ready() is None
            if ready != said:
                said = ready
                kind = health_pb2.HealthCheckResponse
                status = kind.SERVING if ready else kind.NOT_SERVING
                for name in ("", NAME):
                    await self._health.set(name, status)
            await asyncio.sleep(_READY_S)
