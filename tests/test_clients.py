"""HTTP over a real socket: the official `openai` client, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
import openai
import pytest
from edge import MAX_BYTES, TOKENIZER, Edge, edge
from engines import Scripted

from whalepod.errors import NotReady, Overloaded

T = TypeVar("T")
TEXT = "The whale swam past 鲸 the harbour"
IDS = TOKENIZER.encode_text(TEXT)
HELLO: list[Any] = [{"role": "user", "content": "Where do whales live?"}]
THINKING: dict[str, Any] = {"thinking": {"type": "enabled"}}


def served(engine: Scripted, act: Callable[[Edge], Awaitable[T]]) -> T:
    async def run() -> T:
        async with edge(engine) as servers, asyncio.timeout(30):
            return await act(servers)

    return asyncio.run(run())


def with_openai(
    engine: Scripted, act: Callable[[openai.AsyncOpenAI], Awaitable[T]], retries: int = 0
) -> T:
    async def run(servers: Edge) -> T:
        # Not to read the certificates of the world for plain HTTP: it takes 0.2 s.
        plain = openai.DefaultAsyncHttpxClient(verify=False)
        async with openai.AsyncOpenAI(
            base_url=f"{servers.http}/v1", api_key="none", max_retries=retries, http_client=plain
        ) as client:
            return await act(client)

    return served(engine, run)


# -- the official client ----------------------------------------------------------------------


def test_completions() -> None:
    async def act(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.completions.create(model="tiny", prompt="x", max_tokens=len(IDS))
        stream = await client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=len(IDS),
            stream=True,
            stream_options={"include_usage": True},
        )
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_openai(Scripted(IDS), act)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == TEXT
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == len(IDS)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + len(IDS)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == TEXT
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("thinking", [False, True])
def test_chat(thinking: bool) -> None:
    script = [*TOKENIZER.encode_text("It lives. "), TOKENIZER.control_id("</think>"), *IDS, 1]
    extra = THINKING if thinking else None

    async def act(client: openai.AsyncOpenAI) -> tuple[Any, Any]:
        whole = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=100, extra_body=extra
        )
        async with client.chat.completions.stream(
            model="tiny",
            messages=HELLO,
            extra_body=extra,
            stream_options={"include_usage": True},
        ) as stream:
            return whole, await stream.get_final_completion()

    whole, gathered = with_openai(Scripted(script), act)
    reasoning = "It lives. " if thinking else None
    content = TEXT if thinking else f"It lives. {TEXT}"
    for answer in (whole, gathered):
        message = answer.choices[0].message
        assert message.role == "assistant"
        assert message.content == content
        assert message.model_extra.get("reasoning_content") == reasoning
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(script)


def test_models() -> None:
    async def act(client: openai.AsyncOpenAI) -> list[Any]:
        return [m async for m in client.models.list()] + [await client.models.retrieve("tiny")]

    listed, retrieved = with_openai(Scripted(), act)
    assert listed == retrieved
    assert listed.id == "tiny"


def test_errors_have_the_clients_own_types() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        create = client.completions.create
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            await create(model="tiny", prompt="x", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="use 'tiny'") as unknown:
            await create(model="gpt-4", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="tools"):
            await client.chat.completions.create(
                model="tiny",
                messages=HELLO,
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        assert (await create(model="tiny", prompt="x", max_tokens=1)).choices

    with_openai(Scripted(IDS), act)


def test_engine_faults_have_the_clients_own_types() -> None:
    engine = Scripted(IDS)

    async def act(client: openai.AsyncOpenAI) -> None:
        for failure, kind in (
            (Overloaded("the queue is full", 1), openai.RateLimitError),
            (NotReady("no member serves"), openai.InternalServerError),
            (ZeroDivisionError("secret"), openai.InternalServerError),
        ):
            engine.failure = failure
            for stream in (False, True):
                with pytest.raises(kind) as raised:
                    await client.completions.create(model="tiny", prompt="x", stream=stream)
                assert "secret" not in str(raised.value)

    with_openai(engine, act)


def test_a_fault_in_a_stream_reaches_the_client() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the pool went away"):
            [chunk async for chunk in stream]

    engine = Scripted(IDS)
    engine.late_failure = NotReady("the pool went away")
    with_openai(engine, act)


def test_retry_after_is_what_the_client_waits_for() -> None:
    async def act(client: openai.AsyncOpenAI) -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, lambda: setattr(engine, "failure", None))
        began = loop.time()
        await client.completions.create(model="tiny", prompt="x", max_tokens=1)
        return loop.time() - began

    engine = Scripted(IDS)
    engine.failure = Overloaded("the queue is full", 1.0)
    assert 1.0 <= with_openai(engine, act, retries=2) < 1.9
    assert len(engine.requests) == 2


# -- time, and clients that leave ---------------------------------------------------------------


def test_tokens_are_sent_one_by_one_as_they_come() -> None:
    async def act(client: openai.AsyncOpenAI) -> list[float]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        stream = await client.completions.create(
            model="tiny", prompt="x", max_tokens=4, stream=True
        )
        return [loop.time() - began async for _ in stream]

    pause = 0.2
    times = with_openai(Scripted([5, 6, 7, 8], pause_s=pause), act)
    assert len(times) == 4
    for i, at in enumerate(times):
        assert (i + 1) * pause <= at < (i + 1.9) * pause, times


@pytest.mark.parametrize("how", ["whole", "before the first token", "in the stream"])
def test_a_client_that_goes_away_cancels_its_request(how: str) -> None:
    body = {"prompt": "x", "max_tokens": 150, "stream": how != "whole"}
    engine = Scripted(IDS * 50, pause_s=30 if how == "before the first token" else 0.02)

    async def act(servers: Edge) -> str:
        async with httpx.AsyncClient(base_url=servers.http, verify=False) as client:
            request = client.build_request("POST", "/v1/completions", json=body)
            task = asyncio.create_task(client.send(request, stream=True))
            while not engine.requests:
                await asyncio.sleep(0.005)
            if how == "in the stream":
                response = await task
                async for _ in response.aiter_lines():
                    break
                await response.aclose()
            else:
                task.cancel()
                await asyncio.wait({task})
        await servers.until_cancelled()
        return servers.service.metrics.render().decode()

    text = served(engine, act)
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
    assert 'vllm:num_requests_waiting{model_name="tiny"} 0.0' in text


# -- bodies -------------------------------------------------------------------------------------


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
    ('{"prompt": "x", "user": "\\ud800", "n": 2}', "or send 1"),
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
