"""HTTP over a real socket: the official `openai` client, and clients that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
import openai
import pytest
from edge import TOKENIZER, Edge, served
from engines import Scripted

from whalepod.errors import NotReady, Overloaded

T = TypeVar("T")
TEXT = "The whale swam past 鲸 the harbour"
IDS = TOKENIZER.encode_text(TEXT)
HELLO: list[Any] = [{"role": "user", "content": "Where do whales live?"}]
THINKING: dict[str, Any] = {"thinking": {"type": "enabled"}}


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
