"""HTTP: the OpenAI endpoints, health, readiness and metrics, over one `Service`."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from whalepod import __version__
from whalepod.errors import DeadlineExceeded, NotReady, Overloaded, RequestError
from whalepod.ingress.body import BodyLimit
from whalepod.ingress.generation import EngineFailed
from whalepod.ingress.objects import error_body
from whalepod.ingress.openai import ChatBody, CompletionBody, parse
from whalepod.ingress.replies import ChatReply, CompletionReply, Reply
from whalepod.ingress.service import Service, UnknownModel

log = logging.getLogger(__name__)
T = TypeVar("T")
Status = Callable[[], Awaitable[dict[str, Any]]]


def make_app(
    service: Service,
    *,
    max_body_bytes: int = 8 << 20,
    default_thinking: bool = True,
    status: Status | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        default_thinking: whether chat thinks when a request does not say.
        status: the cluster's report, for `GET /status`.
        lifespan: run around the application's life.
    """
    app = FastAPI(
        title="whalepod",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan or (lambda app: nullcontext()),
    )
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    _add_errors(app)
    _add_state(app, service, status)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        with service.admission():
            body: CompletionBody = parse(CompletionBody, await _json(request))
            service.check_model(body.model)
            ids = await service.encode_prompt(body.prompt)
            generation = service.complete(ids, body.options(body.max_tokens))
        return await _answer(request, CompletionReply(service, generation, body), body.stream)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        with service.admission():
            body: ChatBody = parse(ChatBody, await _json(request))
            service.check_model(body.model)
            thinking = body.is_thinking(default_thinking)
            ids = await service.encode_chat([m.plain() for m in body.messages], thinking)
            most = body.max_completion_tokens
            options = body.options(body.max_tokens if most is None else most)
            generation = service.chat(ids, options)
        return await _answer(request, ChatReply(service, generation, body), body.stream)

    return app


def _add_state(app: FastAPI, service: Service, status: Status | None) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        reason = await service.ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"retry-after": "1"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/status")
    async def cluster() -> Response:
        if status is None:
            return JSONResponse({"ready": await service.ready() is None, "members": []})
        return JSONResponse(await status())


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse(*describe(error))

    # The handler of Exception also has the server log the traceback.
    for kind in (
        RequestError,
        Overloaded,
        DeadlineExceeded,
        NotReady,
        EngineFailed,
        ClientGone,
        Exception,
    ):
        app.add_exception_handler(kind, refused)

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such path", 405: "this path does not take that method"}
        text = what.get(error.status_code, str(error.detail))
        body = error_body(f"{text}: {request.method} {request.url.path}", "invalid_request_error")
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(HTTPException, unrouted)


def describe(error: Exception) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Error object, status and headers of an exception; never a traceback."""
    if isinstance(error, UnknownModel):
        body = error_body(str(error), "invalid_request_error", "model", "model_not_found")
        return body, 404, {}
    if isinstance(error, RequestError):
        return error_body(str(error), "invalid_request_error", error.param), 400, {}
    if isinstance(error, Overloaded):
        retry = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        return error_body(str(error), "rate_limit_error", code="overloaded"), 429, retry
    if isinstance(error, DeadlineExceeded):
        # Clients send again by themselves after 5xx, but this one's sender has stopped waiting.
        retry = {"x-should-retry": "false"}
        return error_body(str(error), "timeout_error", "timeout", "deadline_exceeded"), 504, retry
    if isinstance(error, (NotReady, EngineFailed)):
        code = "not_ready" if isinstance(error, NotReady) else "engine_failed"
        return error_body(str(error), "server_error", code=code), 503, {"retry-after": "1"}
    if isinstance(error, ClientGone):
        return error_body(str(error), "server_error", code="client_gone"), 499, {}
    text = f"the server failed ({type(error).__name__}); the fault is in its log"
    return error_body(text, "server_error", code="internal_error"), 500, {}


async def _json(request: Request) -> Any:
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if kind != "application/json":
        raise RequestError(f"the content type is {kind!r}; send application/json")
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ClientGone("the client left before its request was whole") from None
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is no UTF-8 (byte {error.start}); encode it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError:  # more digits than Python turns into an int
        raise RequestError("the body holds a number with too many digits") from None


def _no_constant(name: str) -> Any:
    raise RequestError(f"{name} is no JSON number; send a finite one")


async def _answer(request: Request, reply: Reply, stream: bool) -> Response:
    if not stream:
        return JSONResponse(await _while_connected(request, reply.whole()))
    chunks = reply.chunks()
    # The first chunk decides between a stream and an error status.
    first = await _while_connected(request, anext(chunks))
    return EventStream(_events(first, chunks), media_type="text/event-stream")


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, but give it up when the client goes away. Raises ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed its connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response ends what it is made of at once."""

    def __init__(self, events: AsyncGenerator[bytes, None], **options: Any) -> None:
        super().__init__(events, **options)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they or the client end."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(
    first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(chunks):
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:
        body, status, _ = describe(error)
        if status == 500:
            log.exception("a stream failed")
        yield _event(body)
    yield b"data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "whalepod",
        "max_model_len": service.max_context,
    }
