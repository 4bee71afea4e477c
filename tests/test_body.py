"""Bodies that are too large, cut short, hostile or no JSON, over a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from edge import MAX_BYTES, TOKENIZER, Edge, served
from engines import Scripted

IDS = TOKENIZER.encode_text("The whale swam past")


async def post(servers: Edge, content: Any, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=servers.http, timeout=20, verify=False) as client:
        kind = {"content-type": "application/json", **headers}
        return await client.post("/v1/completions", content=content, headers=kind)


async def still_serves(servers: Edge) -> bool:
    good = await post(servers, json.dumps({"prompt": "x", "max_tokens": 2}))
    return good.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [MAX_BYTES + 1, 20_000_000])
def test_a_body_over_the_limit_gets_413_and_not_a_reset(size: int, chunked: bool) -> None:
    async def pieces() -> Any:
        for begin in range(0, size, 65536):
            yield b"x" * min(65536, size - begin)

    async def act(servers: Edge) -> None:
        for _ in range(3):
            answer = await post(servers, pieces() if chunked else b"x" * size)
            assert answer.status_code == 413
            error = answer.json()["error"]
            assert error["code"] == "body_too_large"
            assert f"exceeds {MAX_BYTES} bytes; send a smaller one" in error["message"]
        assert await still_serves(servers)

    served(Scripted(IDS), act)


def test_an_announced_body_is_refused_before_it_is_sent() -> None:
    """As curl does it: `Expect: 100-continue`, and no body after a final status."""

    async def act(servers: Edge) -> bytes:
        host, port = servers.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            "content-length: 20000000\r\nexpect: 100-continue\r\n\r\n"
        )
        writer.write(head.encode())
        first = await asyncio.wait_for(reader.readline(), 1)
        writer.close()
        await writer.wait_closed()
        return first

    assert b" 413 " in served(Scripted(IDS), act)


def test_a_body_that_stops_short_leaves_nothing_behind() -> None:
    async def act(servers: Edge) -> None:
        host, port = servers.http.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await still_serves(servers)
        assert len(servers.engine.requests) == 1

    served(Scripted(IDS), act)


HOSTILE = [
    ('{"prompt": [' + '"a",' * 20_000 + '"a"]}', "only one prompt"),
    ('{"prompt": [1,' + '"a",' * 20_000 + '"a"]}', "valid integer"),
    ('{"prompt": "x", "stop": [' + "1," * 40_000 + "1]}", "valid string"),
    ("{" + ",".join(f'"{i}":1' for i in range(9_000)) + "}", "is not known here"),
    ('{"prompt": "x", "seed": ' + "9" * 5_000 + "}", "too many digits"),
    ('{"prompt": "x", "max_tokens": ' + "9" * 4_000 + "}", "ask for at most"),
    ('{"prompt": [' + "9" * 4_000 + "]}", "outside the vocabulary"),
    ('{"prompt": "x", "\\ud800": 1}', "is not known here"),
    ('{"prompt": "x", "user": "\\ud800", "n": 200}', "or equal to 128"),
    ('{"prompt": "x", "stop_token_ids": [1024]}', "outside the vocabulary"),
    ('{"prompt": "x", "model": "' + "m" * 50_000 + '"}', "not served here"),
    ('{"prompt": "' + "word " * 19_000 + '"}', "the context holds 200"),
    ('{"a":' * 15_000 + "1" + "}" * 15_000, "nested too deeply"),
]


def test_hostile_bodies_are_answered_at_once_and_in_few_words() -> None:
    async def act(servers: Edge) -> None:
        for body, fact in HOSTILE:
            assert len(body) <= MAX_BYTES
            answer = await asyncio.wait_for(post(servers, body.encode()), 2)
            assert answer.status_code in (400, 404), body[:80]
            message = answer.json()["error"]["message"]
            assert fact in message
            assert len(message) < 400
            assert await still_serves(servers)

    served(Scripted(IDS), act)


def test_any_seed_and_any_top_k_are_taken() -> None:
    async def act(servers: Edge) -> None:
        for seed, top_k in ((-1, 10**30), (10**40, 1024), (2**63, 1023)):
            body = {"prompt": "x", "max_tokens": 1, "seed": seed, "top_k": top_k}
            assert (await post(servers, json.dumps(body))).status_code == 200

    engine = Scripted(IDS)
    served(engine, act)
    samplings = [r.sampling for r in engine.requests]
    assert [s.seed for s in samplings] == [2**63 - 1, 10**40 % 2**63, 0]
    assert [s.top_k for s in samplings] == [0, 0, 1023]


def test_other_content_types_are_refused() -> None:
    async def act(servers: Edge) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            answer = await post(servers, b'{"prompt": "x"}', **{"content-type": kind})
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert kind in message
            assert "send application/json" in message

    served(Scripted(IDS), act)
