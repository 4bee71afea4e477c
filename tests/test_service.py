"""The service alone: what it asks the engine, what it counts, what it does beside the loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from edge import MODEL, TOKENIZER, make_service
from engines import Scripted
from prometheus_client.parser import text_string_to_metric_families

from whalepod.engine.request import Request, TokenEvent
from whalepod.errors import NotReady, Overloaded, RequestError
from whalepod.ingress.generation import EngineFailed
from whalepod.ingress.options import Options
from whalepod.ingress.service import Service
from whalepod.metrics import Metrics
from whalepod.model.chat import Message

IDS = TOKENIZER.encode_text("The whale swam past")


async def gather(service: Service, options: Options | None = None) -> str:
    generation = service.complete([5, 6], options or Options())
    return "".join([delta.content async for delta in generation.deltas])


def samples(service: Service) -> dict[str, float]:
    """Metric values by name and label; the label `model_name` is left out."""
    found = {}
    text = service.metrics.render().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            if not sample.name.endswith(("_bucket", "_created")):
                found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_a_request_is_counted_and_timed() -> None:
    service = make_service(Scripted(IDS, pause_s=0.02))
    asyncio.run(gather(service))
    found = samples(service)
    assert found["vllm:prompt_tokens_total"] == 2
    assert found["vllm:generation_tokens_total"] == len(IDS)
    assert found["vllm:request_success_total length"] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == len(IDS) - 1
    assert found["vllm:request_prompt_tokens_sum"] == 2
    assert found["vllm:request_generation_tokens_sum"] == len(IDS)
    first, between = (
        found[f"vllm:{name}_seconds_sum"] for name in ("time_to_first_token", "inter_token_latency")
    )
    assert 0.02 <= first < 0.2
    assert 0.02 * (len(IDS) - 1) <= between
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(first + between, abs=0.02)
    mean = between / (len(IDS) - 1)
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(mean)


def test_gauges_follow_a_request() -> None:
    async def run() -> list[tuple[float, float]]:
        service = make_service(Scripted(IDS))
        seen = []

        def look() -> None:
            found = samples(service)
            seen.append((found["vllm:num_requests_waiting"], found["vllm:num_requests_running"]))

        look()
        engine = service.client
        assert isinstance(engine, Scripted)
        generation = service.complete([5], Options())
        engine.pause_s = 0.05
        first = asyncio.ensure_future(anext(generation.deltas))
        await asyncio.sleep(0.01)
        look()
        await first
        look()
        await generation.deltas.aclose()
        look()
        return seen

    assert asyncio.run(run()) == [(0, 0), (1, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RequestError("too long", "prompt"), "invalid"),
        (Overloaded("full", 1), "overloaded"),
        (NotReady("nobody"), "not_ready"),
    ],
)
def test_a_refused_request_is_no_ended_one(failure: Exception, reason: str) -> None:
    engine = Scripted(IDS)
    engine.failure = failure
    service = make_service(engine)
    with pytest.raises(type(failure)):
        asyncio.run(gather(service))
    found = samples(service)
    assert found[f"vllm:admission_rejections_total {reason}"] == 1
    assert not [name for name in found if name.startswith("vllm:request_success")]
    assert found["vllm:num_requests_waiting"] == 0
    assert found["vllm:prompt_tokens_total"] == 0
    assert found["vllm:e2e_request_latency_seconds_count"] == 0


def test_admission_counts_what_is_invalid() -> None:
    service = make_service(Scripted())
    with pytest.raises(RequestError), service.admission():
        service.check_model("gpt")
    assert samples(service)["vllm:admission_rejections_total invalid"] == 1


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_an_engine_that_gives_up_is_an_error_with_its_words(finish: Any) -> None:
    class GivesUp(Scripted):
        async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
            yield TokenEvent(request.id, 0, 5)
            yield TokenEvent(request.id, 1, -1, finish=finish, error="the member was drained")

    service = make_service(GivesUp())
    with pytest.raises(EngineFailed, match="the member was drained"):
        asyncio.run(gather(service))
    assert samples(service)["vllm:request_success_total error"] == 1


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    class BreaksOff(Scripted):
        async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
            yield TokenEvent(request.id, 0, 5)

    with pytest.raises(EngineFailed, match="broke off"):
        asyncio.run(gather(make_service(BreaksOff())))


def test_the_engine_is_let_go_before_the_last_delta_is_out() -> None:
    async def run() -> list[str]:
        engine = Scripted(TOKENIZER.encode_text("one two three four"))
        generation = make_service(engine).complete([5], Options(stop=("two",)))
        async for delta in generation.deltas:
            if delta.finish is not None:
                return list(engine.cancelled)
        raise AssertionError("no last delta")

    assert len(asyncio.run(run())) == 1


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    engine = Scripted(IDS)
    service = make_service(engine)
    for _ in range(8):
        asyncio.run(gather(service))
    assert len({r.sampling.seed for r in engine.requests}) == 8
    assert len({r.id for r in engine.requests}) == 8


def test_a_continued_prefix_is_answered_with_content_not_reasoning() -> None:
    messages = [Message("user", "A"), Message("assistant", "B", "R", prefix=True)]

    async def run(messages: list[Message]) -> tuple[str, str]:
        service = make_service(Scripted(IDS))
        generation = service.chat(await service.encode_chat(messages, True), Options())
        deltas = [delta async for delta in generation.deltas]
        return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)

    assert asyncio.run(run(messages)) == ("", "The whale swam past")
    assert asyncio.run(run(messages[:1])) == ("The whale swam past", "")


def test_a_long_text_is_encoded_beside_the_event_loop() -> None:
    text = "The whale swam past the harbour. " * 20_000

    async def run() -> tuple[list[int], list[float]]:
        service = Service(Scripted(), TOKENIZER, "tiny", MODEL, 10**6, Metrics("tiny"))
        loop = asyncio.get_running_loop()
        ticks = [loop.time()]
        task = asyncio.ensure_future(service.encode_prompt(text))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks.append(loop.time())
        return task.result(), ticks

    ids, ticks = asyncio.run(run())
    assert ids == [0, *TOKENIZER.encode_text(text)]
    whole = ticks[-1] - ticks[0]
    longest = max(b - a for a, b in itertools.pairwise(ticks))
    # Held by the interpreter lock the loop would tick once.
    assert longest < whole / 2, (longest, whole)


def test_an_engine_that_cannot_be_asked_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(Scripted):
        async def ready(self) -> str | None:
            raise ConnectionError("gone")

    assert "cannot be read" in str(asyncio.run(make_service(Mute()).ready()))
    assert "gone" in caplog.text
