"""HTTP: the OpenAI endpoints, health, readiness and metrics, over one `Service`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whalepod import __version__
from whalepod.errors import NotReady, Overloaded, RequestError, WhalepodError
from whalepod.ingress.openai import ChatBody, CompletionBody, error_body, parse
from whalepod.ingress.replies import ChatReply, CompletionReply, Reply
from whalepod.ingress.service import Service, UnknownModel

Status = Callable[[], Awaitable[dict[str, Any]]]


class BodyLimit:
    """Refuse request bodies over a size while they arrive, whether announced or chunked."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._limit:
            await self._refuse(scope, receive, send)
            return
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), bool(message.get("more_body"))
            if size > self._limit:
                await self._refuse(scope, receive, send)
                return
        body: Message | None = {"type": "http.request", "body": b"".join(chunks)}

        async def replay() -> Message:
            nonlocal body
            if body is not None:
                found, body = body, None
                return found
            return await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the request body exceeds {self._limit} bytes; send a smaller one"
        response = JSONResponse(
            error_body(text, "invalid_request_error", code="body_too_large"),
            413,
            {"connection": "close"},
        )
        await response(scope, receive, send)


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
        body: CompletionBody = parse(CompletionBody, await _json(request))
        service.check_model(body.model)
        ids = service.encode_prompt(body.single_prompt())
        generation = service.complete(ids, body.options(body.max_tokens))
        return await _answer(CompletionReply(service, generation, body), body.stream)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body: ChatBody = parse(ChatBody, await _json(request))
        service.check_model(body.model)
        thinking = body.is_thinking(default_thinking)
        ids = service.encode_chat([m.plain() for m in body.messages], thinking)
        options = body.options(body.max_completion_tokens or body.max_tokens)
        generation = service.chat(ids, options, thinking)
        return await _answer(ChatReply(service, generation, body), body.stream)

    return app


def _add_state(app: FastAPI, service: Service, status: Status | None) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        reason = await service.client.ready()
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
            return JSONResponse({"ready": await service.client.ready() is None, "members": []})
        return JSONResponse(await status())


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse(*describe(error))

    for kind in (WhalepodError, Exception):
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
        retry = {"retry-after": str(max(1, round(error.retry_after_s)))}
        return error_body(str(error), "rate_limit_error", code="overloaded"), 429, retry
    if isinstance(error, NotReady):
        body = error_body(str(error), "server_error", code="not_ready")
        return body, 503, {"retry-after": "1"}
    text = f"the server failed ({type(error).__name__}); the fault is in its log"
    return error_body(text, "server_error", code="internal_error"), 500, {}


async def _json(request: Request) -> Any:
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if kind != "application/json":
        raise RequestError(f"the content type is {kind!r}; send application/json")
    raw = await request.body()
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


def _no_constant(name: str) -> Any:
    raise RequestError(f"{name} is no JSON number; send a finite one")


async def _answer(reply: Reply, stream: bool) -> Response:
    if not stream:
        return JSONResponse(await reply.whole())
    chunks = reply.chunks()
    # The first chunk decides between a stream and an error status.
    first = await anext(chunks)
    return StreamingResponse(_events(first, chunks), media_type="text/event-stream")


async def _events(first: dict[str, Any], chunks: Any) -> AsyncIterator[bytes]:
    try:
        async with aclosing(chunks):
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:
        yield _event(describe(error)[0])
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
