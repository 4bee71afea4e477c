"""Several answers and log-probabilities of prompts over gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from edge import TOKENIZER, Edge, failure_of, with_channel
from engines import Scripted

from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as rpc

IDS = TOKENIZER.encode_text("The whale swam past")


def request(**sampling: Any) -> pb.CompleteRequest:
    tokens = pb.TokenIds(ids=[5, 6, 7])
    return pb.CompleteRequest(tokens=tokens, sampling=pb.Sampling(**sampling))


def chat(**sampling: Any) -> pb.ChatRequest:
    messages = [pb.Message(role=pb.ROLE_USER, content="hi")]
    return pb.ChatRequest(messages=messages, sampling=pb.Sampling(**sampling))


def test_the_prompt_is_told_of_once() -> None:
    async def act(servers: Edge, channel: Any) -> tuple[Any, Any, Any]:
        stub = rpc.InferenceStub(channel)
        asked = request(prompt_logprobs=2, max_tokens=2)
        parts = [part async for part in stub.CompleteStream(asked)]
        alone = request(prompt_logprobs=0, max_tokens=0)
        return await stub.Complete(asked), parts, await stub.Complete(alone)

    whole, parts, alone = with_channel(Scripted(IDS), act)
    told = whole.prompt_logprobs
    assert [one.token_id for one in told] == [5, 6, 7]
    assert not told[0].HasField("logprob")
    assert [(one.logprob, one.rank) for one in told[1:]] == [(-0.25, 2), (-0.5, 2)]
    assert [(t.token_id, t.logprob) for t in told[1].top] == [(300, -0.125), (301, -0.125)]
    assert [len(part.prompt_logprobs) for part in parts] == [3, *[0] * (len(parts) - 1)]
    assert [one.token_id for one in alone.prompt_logprobs] == [5, 6, 7]
    assert alone.finish_reason == pb.FINISH_REASON_LENGTH
    assert (alone.text, list(alone.token_ids)) == ("", [])
    assert alone.usage.completion_tokens == 0
    assert not whole.others


def test_several_answers() -> None:
    engine = Scripted(IDS)

    async def act(servers: Edge, channel: Any) -> tuple[Any, Any, Any]:
        stub = rpc.InferenceStub(channel)
        asked = {"n": 3, "max_tokens": 2, "seed": 4}
        parts = [part async for part in stub.CompleteStream(request(**asked))]
        return await stub.Complete(request(**asked)), parts, await stub.Chat(chat(**asked))

    whole, parts, talk = with_channel(engine, act)
    assert [r.sampling.seed for r in engine.requests[:3]] == [4, 5, 6]
    for answer in (whole, talk):
        assert answer.index == 0
        assert [other.index for other in answer.others] == [1, 2]
        assert answer.usage.completion_tokens == 6
        for other in answer.others:
            assert other.finish_reason == pb.FINISH_REASON_LENGTH
            assert len(other.token_ids) == 2
            assert not other.HasField("usage")
    assert whole.text == whole.others[0].text == TOKENIZER.decode(IDS[:2])
    assert talk.others[1].content == whole.text
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sorted(part.index for part in parts if part.finish_reason) == [0, 1, 2]
    assert parts[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"n": 0}, "n is 0; expected 1 to 128"),
        ({"n": 129}, "n is 129; expected 1 to 128"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; expected at most 20"),
        ({"max_tokens": 0}, "max_tokens is 0, so there is nothing to answer"),
    ],
)
def test_what_cannot_be_made_is_refused(sampling: dict[str, int], said: str) -> None:
    async def act(servers: Edge, channel: Any) -> Any:
        return await failure_of(rpc.InferenceStub(channel).Complete(request(**sampling)))

    error = with_channel(Scripted(IDS), act)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in error.details()


def test_an_rpc_that_is_cancelled_ends_all_answers() -> None:
    async def act(servers: Edge, channel: Any) -> None:
        call = rpc.InferenceStub(channel).CompleteStream(request(n=3, max_tokens=100))
        seen: set[int] = set()
        async for part in call:
            seen.add(part.index)
            if len(seen) == 3:
                break
        call.cancel()
        await servers.until_cancelled(3)

    with_channel(Scripted(IDS * 100, pause_s=0.005), act)
