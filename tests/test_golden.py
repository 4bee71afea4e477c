"""Whole transcripts of both protocols, byte for byte, in `golden/`.

`WHALEPOD_GOLDEN=write` (make golden) writes them anew; read the difference in review. What
changes from run to run, ids and times, is replaced first.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from edge import TOKENIZER, edge, make_service
from engines import Scripted
from google.protobuf import text_format

from whalepod.errors import NotReady, Overloaded
from whalepod.ingress.http import make_app
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

GOLDEN = Path(__file__).parent / "golden"
ANSWER = [
    *TOKENIZER.encode_text("They roam."),
    TOKENIZER.control_id("</think>"),
    *TOKENIZER.encode_text("In the sea 🐋."),
    1,
]
COMPLETION = {"model": "tiny", "prompt": "The whale", "max_tokens": 5, "seed": 1}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Where do whales live?"}],
    "thinking": {"type": "enabled"},
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
HTTP: dict[str, tuple[str, Any, Exception | None]] = {
    "completion": ("/v1/completions", COMPLETION, None),
    "completion_stream": ("/v1/completions", {**COMPLETION, **STREAM}, None),
    "completion_token_ids": ("/v1/completions", {**COMPLETION, "return_token_ids": True}, None),
    "chat": ("/v1/chat/completions", CHAT, None),
    "chat_stream": ("/v1/chat/completions", {**CHAT, **STREAM}, None),
    "error_400": ("/v1/completions", {**COMPLETION, "temperature": 3}, None),
    "error_404": ("/v1/completions", {**COMPLETION, "model": "gpt"}, None),
    "error_429": ("/v1/completions", COMPLETION, Overloaded("the queue is full", 2)),
    "error_503": ("/v1/completions", COMPLETION, NotReady("waiting for an expert member")),
    "error_in_stream": ("/v1/completions", {**COMPLETION, **STREAM}, NotReady("the pool is gone")),
    "models": ("/v1/models", None, None),
}


def check(name: str, found: str) -> None:
    path = GOLDEN / name
    if os.environ.get("WHALEPOD_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def steady(text: str) -> str:
    text = re.sub(r'((?:cmpl|chatcmpl)-|id: ")[0-9a-f]{24}', r"\1ID", text)
    return re.sub(r'"created": ?[1-9]\d*', '"created":0', text)


async def over_http(path: str, body: Any, failure: Exception | None) -> str:
    engine = Scripted(ANSWER)
    if body is not None and body.get("stream"):
        engine.late_failure = failure
    else:
        engine.failure = failure
    transport = httpx.ASGITransport(make_app(make_service(engine)))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        reply = await (client.get(path) if body is None else client.post(path, json=body))
    kept = [f"{name}: {reply.headers[name]}" for name in KEPT if name in reply.headers]
    asked = "GET" if body is None else "POST"
    sent = "" if body is None else json.dumps(body, ensure_ascii=False) + "\n"
    head = "\n".join([f"{reply.status_code}", *kept])
    return steady(f"{asked} {path}\n{sent}\n{head}\n\n{reply.text.rstrip()}\n")


KEPT = ("content-type", "retry-after")


@pytest.mark.parametrize("name", sorted(HTTP))
def test_http(name: str) -> None:
    check(f"{name}.http", asyncio.run(over_http(*HTTP[name])))


async def over_grpc() -> str:
    sampling = pb.Sampling(max_tokens=5, seed=1)
    completion = pb.CompleteRequest(text="The whale", sampling=sampling)
    messages = [pb.Message(role=pb.ROLE_USER, content="Where do whales live?")]
    chat = pb.ChatRequest(messages=messages, thinking=True)
    out = []
    async with (
        edge(Scripted(ANSWER), http=False) as servers,
        grpc.aio.insecure_channel(servers.grpc) as channel,
    ):
        stub = pb_grpc.InferenceStub(channel)
        calls: list[tuple[str, Any]] = [
            ("ListModels", pb.ListModelsRequest()),
            ("Complete", completion),
            ("CompleteStream", completion),
            ("Chat", chat),
            ("ChatStream", chat),
        ]
        for method, request in calls:
            call = getattr(stub, method)(request)
            streams = method.endswith("Stream")
            replies = [part async for part in call] if streams else [await call]
            out += [f"# {method}", *(line(m) for m in (request, *replies)), ""]
    return steady("\n".join(out))


def line(message: Any) -> str:
    return str(text_format.MessageToString(message, as_one_line=True, as_utf8=True))


def test_grpc() -> None:
    check("inference.txtpb", asyncio.run(over_grpc()))
