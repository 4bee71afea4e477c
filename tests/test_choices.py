"""Several choices of one prompt: what they are, what they cost, and how they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge import MAX_CONTEXT, TOKENIZER, Edge, make_service, served
from engines import Scripted

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, TokenEvent
from whalepod.engine.source import Source
from whalepod.errors import Overloaded, RequestError
from whalepod.ingress.options import Options
from whalepod.ingress.service import Service
from whalepod.ingress.together import together
from whalepod.metrics import Metrics
from whalepod.model.checkpoint import Checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [i * 37 % 900 + 20 for i in range(150)]
IDS = TOKENIZER.encode_text("The whale swam past")
LETTERS = [TOKENIZER.encode_text(chr(ord("a") + i))[0] for i in range(26)]


class Engine:
    """An engine in this process: whoever waits for a token steps it."""

    def __init__(self, tiny: Path, **engine: Any) -> None:
        data = {
            "model": {"path": str(tiny)},
            "topology": {"layout": "single"},
            "engine": {"max_step_tokens": 256, "prefix_snapshots": 4, **engine},
        }
        config = Config.from_dict(data)
        source = Source(config.model, Checkpoint.open(tiny))
        self.engine, self.config = SingleEngine(config, source), source.config
        self.queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        queue = self.queues[request.id] = asyncio.Queue()
        self.engine.loop.submit(request)
        done = False
        try:
            while not done:
                while queue.empty():
                    self.engine.step()
                    for event in self.engine.events:
                        self.queues[event.request_id].put_nowait(event)
                    self.engine.events.clear()
                    await asyncio.sleep(0)
                event = queue.get_nowait()
                done = event.finish is not None
                yield event
        finally:
            if not done:
                self.engine.loop.cancel(request.id)

    async def ready(self) -> str | None:
        return None

    def service(self) -> Service:
        return Service(self, None, "tiny", self.config, 400, Metrics("tiny"))


async def choices(service: Service, options: Options) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for delta in service.complete(PROMPT, options).deltas:
        found.setdefault(delta.index, []).extend(delta.tokens)
    return found


def test_a_choice_is_the_answer_to_its_own_seed_and_the_prompt_is_computed_once(
    tiny: Path,
) -> None:
    options = Options(max_tokens=6, seed=11, ignore_eos=True, n=3)
    engine = Engine(tiny)
    found = asyncio.run(choices(engine.service(), options))
    computed = engine.engine.loop.counters.tokens
    assert sorted(found) == [0, 1, 2]
    for i in range(3):
        alone = asyncio.run(choices(Engine(tiny).service(), replace(options, n=1, seed=11 + i)))
        assert found[i] == alone[0]
    assert found[0] != found[1]
    # Of the prompt's second and third time only what is behind the last block.
    block = engine.engine.loop.scheduler.block_tokens
    assert computed < len(PROMPT) + 2 * (len(PROMPT) % block) + 3 * 6 + 1


def test_usage_counts_the_prompt_once_and_all_tokens(tiny: Path) -> None:
    async def run() -> None:
        generation = Engine(tiny).service().complete(PROMPT, Options(max_tokens=4, seed=1, n=3))
        tokens = sum([len(delta.tokens) async for delta in generation.deltas])
        assert generation.usage.prompt_tokens == len(PROMPT)
        assert generation.usage.completion_tokens == tokens
        assert generation.usage.cached_tokens == 0

    asyncio.run(run())


def test_all_are_admitted_or_none(tiny: Path) -> None:
    engine = Engine(tiny, max_batch=2, max_queue=4)
    loop = engine.engine.loop

    async def run(n: int) -> dict[int, list[int]]:
        return await choices(engine.service(), Options(max_tokens=2, n=n))

    for i in range(3):  # two slots, so one of these waits
        loop.submit(Request(f"other-{i}", (1, 2, 3), 8))
    with pytest.raises(Overloaded, match="limit is 4"):
        asyncio.run(run(4))
    assert loop.load == 3
    assert [r.copies for r in engine.requests] == [4]  # the others never came
    engine.queues |= {f"other-{i}": asyncio.Queue() for i in range(3)}
    assert len(asyncio.run(run(3))) == 3
    with pytest.raises(RequestError, match="n is 7, and this server takes at most 6"):
        asyncio.run(run(7))


def test_choices_that_are_still_to_come_take_their_places(tiny: Path) -> None:
    loop = Engine(tiny, max_batch=2, max_queue=4).engine.loop
    loop.submit(Request("first", (1, 2, 3), 8, copies=5))
    assert loop.waiting == 3
    loop.submit(Request("other", (1, 2, 3), 8))
    with pytest.raises(Overloaded):
        loop.submit(Request("late", (1, 2, 3), 8))
    for i in range(4):  # whatever came between
        loop.submit(Request(f"first-{i}", (1, 2, 3), 8, replayed=True))


class Straying(Scripted):
    """Says `a b c ...` to the first choice, and begins later in the alphabet for others."""

    def __init__(self, length: int = 9, pause_s: float = 0.0) -> None:
        super().__init__(pause_s=pause_s)
        self.length = length
        self.broken: int | None = None

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        _, _, index = request.id.partition("-")
        start = int(index or 0)
        speaker = Scripted([LETTERS[i % 26] for i in range(start, start + self.length)])
        speaker.requests, speaker.cancelled = self.requests, self.cancelled
        speaker.pause_s = self.pause_s
        if start == self.broken:
            speaker.late_failure = RuntimeError("lost")
        async for event in speaker.generate(request):
            yield event


async def post(servers: Edge, path: str, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(f"{servers.http}{path}", json={"model": "tiny", **body})


def test_http_gives_choices_in_order_and_chunks_with_their_index() -> None:
    async def act(servers: Edge) -> tuple[httpx.Response, ...]:
        body = {"prompt": "x", "n": 3, "best_of": 3, "max_tokens": 5, "seed": 7}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        chat = {"messages": [{"role": "user", "content": "x"}], "n": 2, "max_tokens": 2}
        return (
            await post(servers, COMPLETIONS, body),
            await post(servers, COMPLETIONS, {**body, **stream}),
            await post(servers, CHAT, chat),
            await post(servers, CHAT, {**chat, **stream}),
        )

    engine = Straying()
    whole, streamed, chat, chat_stream = served(engine, act)
    assert [r.sampling.seed for r in engine.requests[:3]] == [7, 8, 9]
    assert [(r.copies, r.replayed) for r in engine.requests[:3]] == [(3, False), *[(1, True)] * 2]
    answer = whole.json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    texts = [c["text"] for c in answer["choices"]]
    assert len(set(texts)) == 3
    assert [c["finish_reason"] for c in answer["choices"]] == ["length"] * 3
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 15

    chunks = [json.loads(e[6:]) for e in streamed.text.split("\n\n") if e.startswith("data: {")]
    assert chunks[-1]["usage"] == answer["usage"]
    parts = [c["choices"][0] for c in chunks[:-1]]
    for i, text in enumerate(texts):
        own = [part for part in parts if part["index"] == i]
        assert "".join(part["text"] for part in own) == text
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == ["length"]

    said = [c["message"]["content"] for c in chat.json()["choices"]]
    assert len(set(said)) == 2
    chunks = [json.loads(e[6:]) for e in chat_stream.text.split("\n\n") if e.startswith("data: {")]
    parts = [c["choices"][0] for c in chunks[:-1]]
    roles = [part["index"] for part in parts if "role" in part["delta"]]
    assert sorted(roles) == [0, 1]
    for i in range(2):
        own = [part["delta"].get("content", "") for part in parts if part["index"] == i]
        assert "".join(own) == said[i]


def test_a_client_that_leaves_ends_all_choices() -> None:
    async def act(servers: Edge) -> None:
        body = {"model": "tiny", "prompt": "x", "n": 4, "max_tokens": 100, "stream": True}
        async with httpx.AsyncClient() as client:
            url = f"{servers.http}{COMPLETIONS}"
            async with client.stream("POST", url, json=body) as response:
                seen: set[int] = set()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        seen.add(json.loads(line[6:])["choices"][0]["index"])
                    if len(seen) == 4:
                        break
        await servers.until_cancelled(4)

    served(Straying(length=100, pause_s=0.005), act)


def test_a_stop_string_ends_one_choice_alone() -> None:
    async def act(servers: Edge) -> httpx.Response:
        body = {"prompt": "x", "max_tokens": 3, "n": 3, "stop": "d"}
        return await post(servers, COMPLETIONS, body)

    engine = Straying()
    found = served(engine, act).json()["choices"]
    assert [c["finish_reason"] for c in found] == ["length", "stop", "stop"]
    assert [c["text"] for c in found] == ["abc", "bc", "c"]
    assert len(engine.cancelled) == 1  # the second's last token is the engine's last, too


def test_one_that_fails_fails_all() -> None:
    async def act(servers: Edge) -> httpx.Response:
        return await post(servers, COMPLETIONS, {"prompt": "x", "n": 3, "max_tokens": 50})

    engine = Straying(length=50, pause_s=0.005)
    engine.broken = 1
    assert served(engine, act).status_code == 500
    assert len(engine.cancelled) == 3


def test_nothing_starts_when_the_first_is_refused() -> None:
    engine = Scripted(IDS)
    engine.failure = Overloaded("the queue is full", 2)
    service = make_service(engine)

    async def run() -> None:
        async for _ in service.complete([5, 6], Options(n=3)).deltas:
            pass

    with pytest.raises(Overloaded):
        asyncio.run(run())
    assert len(engine.requests) == 1
    text = service.metrics.render().decode()
    assert 'vllm:admission_rejections_total{model_name="tiny",reason="overloaded"} 1.0' in text
    assert 'vllm:num_requests_waiting{model_name="tiny"} 0.0' in text


def test_later_choices_have_the_time_that_is_left() -> None:
    engine = Scripted(IDS, pause_s=0.05)

    async def run() -> None:
        options = Options(n=2, timeout_s=30.0, max_tokens=2)
        async for _ in make_service(engine).complete([5, 6], options).deltas:
            pass

    asyncio.run(run())
    first, second = (r.timeout_s for r in engine.requests)
    assert first == 30.0
    assert second is not None
    assert second < 29.96


def test_together_closes_what_it_reads() -> None:
    closed = []

    async def count(name: str) -> AsyncGenerator[str, None]:
        try:
            for i in range(100):
                await asyncio.sleep(0)
                yield f"{name}{i}"
        finally:
            closed.append(name)

    async def run() -> None:
        stream = together([count("a"), count("b")])
        seen = [await anext(stream) for _ in range(10)]
        assert {item[0] for item in seen} == {"a", "b"}
        await stream.aclose()
        assert sorted(closed) == ["a", "b"]
        assert len([item async for item in together([count("c"), count("d")])]) == 200

    asyncio.run(run())


def test_the_whole_context_may_be_a_prompt_that_is_told_of() -> None:
    async def act(servers: Edge) -> tuple[httpx.Response, ...]:
        body = {"prompt": [5] * MAX_CONTEXT, "max_tokens": 0, "prompt_logprobs": 0}
        return (
            await post(servers, COMPLETIONS, body),
            await post(servers, COMPLETIONS, {**body, "max_tokens": 1}),
        )

    fits, does_not = served(Scripted(IDS), act)
    assert len(fits.json()["choices"][0]["prompt_logprobs"]) == MAX_CONTEXT
    assert does_not.status_code == 400


def test_metrics_count_every_choice_and_no_token_where_none_is_asked_for() -> None:
    service = make_service(Scripted(IDS))

    async def run(max_tokens: int) -> None:
        options = Options(n=2, max_tokens=max_tokens, prompt_logprobs=0)
        async for _ in service.complete([5, 6], options).deltas:
            pass

    def read(name: str) -> str:
        lines = service.metrics.render().decode().splitlines()
        return next(line.split()[-1] for line in lines if line.startswith(f"vllm:{name}{{"))

    asyncio.run(run(0))
    assert read("generation_tokens_total") == "0.0"
    assert read("time_to_first_token_seconds_count") == "0.0"
    assert read("prompt_tokens_total") == "4.0"
    asyncio.run(run(2))
    assert read("generation_tokens_total") == "4.0"
    assert read("request_success_total") == "4.0"
    assert read("num_requests_running") == read("num_requests_waiting") == "0.0"
