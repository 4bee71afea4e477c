"""What may wait, when to come back, and what ends by itself: over the loop, HTTP and gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from edge import TOKENIZER, Edge, failure_of, make_service, served, with_channel
from engines import Scripted
from test_loop import Harness, ask
from test_service import samples

from whalepod.engine.admission import Limits, Pace
from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, TokenEvent
from whalepod.errors import DeadlineExceeded, Overloaded
from whalepod.ingress.grpc import time_left
from whalepod.ingress.options import Options
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

IDS = TOKENIZER.encode_text("The whale swam past")


class Clock:
    """Stands in for the module `time` in the loop."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("whalepod.engine.loop.time", found)
    return found


# -- how long until there is room ---------------------------------------------------------


def test_the_hint_is_the_work_before_it_over_the_measured_rate() -> None:
    pace = Pace()
    pace.learn(2.0, 4, 1000)
    assert pace.seconds_for(6, 0) == pytest.approx(3.0)
    assert pace.seconds_for(0, 2500) == pytest.approx(5.0)
    assert pace.seconds_for(6, 2500) == pytest.approx(5.0)
    assert pace.seconds_for(1, 1) == 1.0  # no less than a second, no more than ten minutes
    assert pace.seconds_for(10**6, 0) == 600.0
    assert Pace().seconds_for(5, 5) == 1.0


def test_what_was_measured_fades() -> None:
    pace = Pace()
    pace.learn(30.0, 300, 0)
    before = pace.seconds_for(100, 0)
    pace.learn(30.0, 0, 0)
    # Half of the old work still counts, and the new time has none.
    assert pace.seconds_for(100, 0) == pytest.approx(before * 3)


@pytest.mark.parametrize(
    ("waiting", "backlog", "prompt", "why"),
    [
        (0, 0, 500, None),  # alone it may be longer than the limit
        (1, 90, 10, None),
        (1, 90, 11, r"90 prompt tokens wait, this request has 11 more, and the limit is 100"),
        (2, 0, 1, r"2 requests wait and the limit is 2 \(engine.max_queue\); send it again in 1 s"),
    ],
)
def test_limits(waiting: int, backlog: int, prompt: int, why: str | None) -> None:
    limits = Limits(2, 100)
    if why is None:
        limits.check(waiting, backlog, prompt, Pace())
    else:
        with pytest.raises(Overloaded, match=why):
            limits.check(waiting, backlog, prompt, Pace())


def test_tokens_that_wait_are_limited_until_they_are_computed() -> None:
    harness = Harness(slots=1, step_tokens=10)
    harness.loop.limits = Limits(99, 40)
    harness.loop.submit(ask("a", 20, 4))
    harness.loop.submit(ask("b", 20, 4))
    assert harness.loop.backlog == 40
    with pytest.raises(Overloaded, match="40 prompt tokens wait, this request has 5 more"):
        harness.loop.submit(ask("c", 5))
    harness.step()
    assert harness.loop.backlog == 30
    harness.loop.submit(ask("c", 5))
    harness.drain()
    assert harness.loop.backlog == 0
    assert len(harness.tokens("c")) == 4


def test_the_hint_follows_the_pace_of_this_member(clock: Clock) -> None:
    harness = Harness(slots=1, max_queue=1)
    for name in "abc":
        harness.loop.submit(ask(name, 1, 2))
        harness.step()
        clock.now += 5.0
        harness.step()
        clock.now += 3600.0  # idle time does not count
        assert not harness.step()
    for name in "de":
        harness.loop.submit(ask(name))
    with pytest.raises(Overloaded) as refused:
        harness.loop.submit(ask("f"))
    assert refused.value.retry_after_s == pytest.approx(5.0)


def test_who_was_taken_in_before_is_taken_in_again() -> None:
    harness = Harness(slots=1, max_queue=1)
    for name in "ab":
        harness.loop.submit(ask(name))
    with pytest.raises(Overloaded):
        harness.loop.submit(ask("c"))
    harness.loop.submit(replace(ask("c"), replayed=True))
    harness.drain()
    assert len(harness.tokens("c")) == 4


# -- deadlines on the member --------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_request_past_its_deadline_ends_at_the_next_plan(clock: Clock, steps: int) -> None:
    harness = Harness(slots=1)
    harness.loop.submit(ask("late", timeout_s=2.0))
    harness.loop.submit(ask("waiting", timeout_s=2.5))
    harness.loop.submit(ask("patient"))
    for _ in range(steps):
        harness.step()
    clock.now += 2.1
    harness.step()
    last = [e for e in harness.events if e.request_id == "late"][-1]
    assert (last.index, last.token, last.finish) == (steps, -1, "deadline")
    assert last.error == "not done within 2 s of its submission"
    assert [s.request.id for s in harness.scheduler.waiting][-1:] == ["patient"]
    clock.now += 0.5
    harness.drain()
    finishes = {e.request_id: e.finish for e in harness.events if e.finish}
    assert finishes == {"late": "deadline", "waiting": "deadline", "patient": "length"}
    harness.assert_empty()


def test_who_is_done_in_time_hears_nothing_of_a_deadline(clock: Clock) -> None:
    harness = Harness()
    harness.loop.submit(ask("a", timeout_s=2.0))
    harness.drain()
    clock.now += 3.0
    harness.drain()
    assert [e.finish for e in harness.events] == [None, None, None, "length"]


def test_events_say_how_long_it_waited_and_what_was_taken_from_it(clock: Clock) -> None:
    harness = Harness(slots=2, blocks=2)
    harness.loop.submit(ask("a", 4, 4))
    clock.now += 1.5
    harness.loop.submit(ask("b", 4, 4))
    clock.now += 0.25
    harness.drain()
    told = {
        name: [(e.queued_s, e.preempted) for e in harness.events if e.request_id == name]
        for name in "ab"
    }
    assert told["a"] == [(1.75, 0), (0, 0), (0, 0), (0, 0)]
    # Both want a second block; the younger one gives way once.
    assert told["b"] == [(0.25, 0), (0, 1), (0, 0), (0, 0)]


# -- at the edge --------------------------------------------------------------------------


class Drafting(Scripted):
    """Says that every second token was guessed, and that as many guesses were wrong."""

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        async for event in super().generate(request):
            yield replace(
                event,
                drafted=2 * (event.index % 2 == 0),
                accepted=event.index % 2,
                queued_s=0.125 if event.index == 0 else 0.0,
                preempted=event.index,
            )


def test_usage_counts_guesses_over_http() -> None:
    async def act(servers: Edge) -> Any:
        async with httpx.AsyncClient(base_url=servers.http) as client:
            body = {"prompt": "x", "max_tokens": 5}
            return (await client.post("/v1/completions", json=body)).json()["usage"]

    assert served(Drafting(IDS * 2), act)["completion_tokens_details"] == {
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 4,
    }


def test_usage_counts_guesses_over_grpc() -> None:
    async def act(servers: Edge, channel: Any) -> Any:
        request = pb.CompleteRequest(text="x", sampling=pb.Sampling(max_tokens=5), priority=-3)
        return (await pb_grpc.InferenceStub(channel).Complete(request, timeout=60)).usage

    engine = Drafting(IDS * 2)
    usage = with_channel(engine, act)
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (2, 4)
    (request,) = engine.requests
    assert request.priority == -3
    assert request.timeout_s is not None
    # gRPC sends a deadline with three digits, rounded up: a server may see a little more.
    assert 50 < request.timeout_s < 61


def test_metrics_count_guesses_preemptions_and_phases() -> None:
    async def run() -> dict[str, float]:
        service = make_service(Drafting(IDS * 2))
        generation = service.complete([5, 6], Options(max_tokens=3))
        assert [d async for d in generation.deltas]
        return samples(service)

    found = asyncio.run(run())
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 4
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 1
    assert found["vllm:num_preemptions_total"] == 3
    assert found["vllm:request_queue_time_seconds_sum"] == 0.125
    for phase in ("prefill", "decode"):
        assert found[f"vllm:request_{phase}_time_seconds_count"] == 1


def test_a_timeout_ends_a_request_and_frees_the_engine() -> None:
    async def run() -> tuple[Scripted, dict[str, float]]:
        engine = Scripted(IDS * 9, pause_s=0.02)
        service = make_service(engine)
        generation = service.complete([5, 6], Options(timeout_s=0.15))
        with pytest.raises(DeadlineExceeded, match=r"not done within its 0.15 s; give it more"):
            async for _ in generation.deltas:
                pass
        return engine, samples(service)

    engine, found = asyncio.run(run())
    assert engine.cancelled == [engine.requests[0].id]
    assert found["vllm:request_success_total deadline"] == 1
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


class Expired(Scripted):
    """An engine that notices the deadline first."""

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, 0, 5, -0.5)
        yield TokenEvent(request.id, 1, -1, 0.0, "deadline", "not done within 3 s")


@pytest.mark.parametrize("engine", [Scripted(IDS * 9, pause_s=0.05), Expired()])
def test_http_answers_504_and_a_stream_gets_an_event(engine: Scripted) -> None:
    body = {"prompt": "x", "timeout": 0.2, "priority": 7}

    async def act(servers: Edge) -> Any:
        async with httpx.AsyncClient(base_url=servers.http) as client:
            whole = await client.post("/v1/completions", json=body)
            return whole, await client.post("/v1/completions", json={**body, "stream": True})

    whole, streamed = served(engine, act)
    assert whole.status_code == 504
    assert whole.headers["x-should-retry"] == "false"
    error = whole.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    assert "not done within" in error["message"]
    assert streamed.status_code == 200
    assert '"code":"deadline_exceeded"' in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    if not isinstance(engine, Expired):
        assert {(r.priority, r.timeout_s) for r in engine.requests} == {(7, 0.2)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", 0), ("timeout", -1), ("timeout", "5"), ("priority", 1.5), ("priority", 1 << 31)],
)
def test_http_refuses_what_is_out_of_range(field: str, value: Any) -> None:
    async def act(servers: Edge) -> Any:
        async with httpx.AsyncClient(base_url=servers.http) as client:
            return await client.post("/v1/completions", json={"prompt": "x", field: value})

    answer = served(Scripted(IDS), act)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_grpc_says_when_to_come_back_and_that_time_is_over() -> None:
    async def act(servers: Edge, channel: Any) -> Any:
        return await failure_of(
            pb_grpc.InferenceStub(channel).Complete(pb.CompleteRequest(text="x"))
        )

    engine = Scripted(IDS)
    engine.failure = Overloaded("full", 2.5)
    found = dict(with_channel(engine, act).trailing_metadata())
    assert (found["retry-after"], found["grpc-retry-pushback-ms"]) == ("3", "2500")
    late = with_channel(Expired(), act)
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert late.details() == "not done within 3 s"


@pytest.mark.parametrize(("left", "expected"), [(None, None), (3.5, 3.5), (9e9, None)])
def test_a_deadline_of_no_end_is_none(left: float | None, expected: float | None) -> None:
    class Context:
        def time_remaining(self) -> float | None:
            return left

    assert time_left(Context()) == expected


def test_a_loop_has_limits_of_its_own() -> None:
    loop = EngineLoop(Harness().scheduler, lambda e: None, max_queue=3, max_context=9)
    assert loop.limits == Limits(3, 1 << 20)
