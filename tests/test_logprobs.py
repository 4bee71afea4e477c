"""Log-probabilities of tokens and of those in their place: from the engine, and over both protocols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from edge import TOKENIZER, edge
from engines import Scripted

from whalepod.config import Config
from whalepod.engine.local import open_engine
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.whole import WholeModel
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as rpc

PROMPT = tuple(range(40, 70))
Told = list[tuple[int, float, tuple[tuple[int, float], ...]]]


def run(tiny: Path, topology: dict[str, Any], count: int = 5, **engine: Any) -> dict[str, Told]:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": topology,
            "engine": {"max_step_tokens": 24, **engine},
        }
    )
    found = open_engine(config, Source(config.model, Checkpoint.open(tiny)))
    todo = [
        Request("asked", PROMPT, 8, Sampling(0.7, seed=3, alternatives=count)),
        Request("silent", PROMPT[:9], 12, Sampling(0.0)),
    ]
    out: dict[str, Told] = {}
    for event in found.run(todo):
        row = (event.token, event.logprob, event.alternatives)
        out.setdefault(event.request_id, []).append(row)
    found.close()
    return out


def test_alternatives_are_those_of_the_whole_model(tiny: Path) -> None:
    told = run(tiny, {"layout": "single"})
    assert all(not others for _, _, others in told["silent"])
    checkpoint = Checkpoint.open(tiny)
    model = WholeModel(checkpoint.config, checkpoint.everything())
    tokens = [token for token, _, _ in told["asked"]]
    logits = model.forward(model.new_state(64), [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    for row, (token, logprob, others) in zip(logits.log_softmax(-1), told["asked"], strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(5)
        assert [i for i, _ in others] == ids.tolist()
        assert [p for _, p in others] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("topology", "engine"),
    [
        ({"stages": 2, "experts": 2}, {}),
        ({"layout": "ep", "attention": 2}, {}),
        ({"layout": "single"}, {"draft_tokens": 3}),
        ({"layout": "single"}, {"max_batch": 1, "max_step_tokens": 7}),
    ],
)
def test_they_are_the_same_to_the_bit(
    topology: dict[str, Any], engine: dict[str, Any], tiny: Path
) -> None:
    assert run(tiny, topology, **engine) == run(tiny, {"layout": "single"})


def test_asking_changes_nothing_else(tiny: Path) -> None:
    asked, silent = (run(tiny, {"layout": "single"}, count)["asked"] for count in (20, 0))
    assert [row[:2] for row in asked] == [row[:2] for row in silent]
    assert {len(others) for _, _, others in asked} == {20}


class Telling(Scripted):
    """Tells two alternatives with every token, if it is asked for any."""

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        async for event in super().generate(request):
            others = ((event.token, -0.5), (300, -1.25))[: request.sampling.alternatives]
            yield replace(event, alternatives=others)


TEXT = "whale é"


async def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    engine = Telling(TOKENIZER.encode_text(TEXT))
    async with edge(engine) as servers, httpx.AsyncClient() as client:
        answer = await client.post(f"{servers.http}{path}", json={"model": "tiny", **body})
    return answer.status_code, answer.text if body.get("stream") else answer.json()


def test_chat_tells_tokens_bytes_and_alternatives() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    _, answer = asyncio.run(post("/v1/chat/completions", body))
    told = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in told) == TEXT.encode()
    for one in told:
        assert one["logprob"] == -0.5
        assert one["top_logprobs"][0] == {k: one[k] for k in ("token", "logprob", "bytes")}
        assert one["top_logprobs"][1]["logprob"] == -1.25
    _, answer = asyncio.run(post("/v1/chat/completions", {**body, "top_logprobs": 0}))
    assert not any(one["top_logprobs"] for one in answer["choices"][0]["logprobs"]["content"])
    _, silent = asyncio.run(post("/v1/chat/completions", {"messages": body["messages"]}))
    assert silent["choices"][0]["logprobs"] is None


def test_completions_tell_lists_whole_and_in_parts() -> None:
    body = {"prompt": "a", "logprobs": 2}
    _, answer = asyncio.run(post("/v1/completions", body))
    told = answer["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [-0.5] * len(told["tokens"])
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    assert all(len(top) == 2 for top in told["top_logprobs"])
    _, stream = asyncio.run(post("/v1/completions", {**body, "stream": True}))
    assert stream.count('"token_logprobs":[-0.5') >= 2


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "less than or equal to 20"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            "top_logprobs: needs logprobs: true",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(path: str, body: dict[str, Any], said: str) -> None:
    status, answer = asyncio.run(post(path, body))
    assert status == 400
    assert said in answer["error"]["message"]


def test_grpc_tells_one_for_each_token() -> None:
    async def ask(logprobs: int | None) -> Any:
        engine = Telling(TOKENIZER.encode_text(TEXT))
        async with (
            edge(engine, http=False) as servers,
            grpc.aio.insecure_channel(servers.grpc) as channel,
        ):
            request = pb.CompleteRequest(text="a", sampling=pb.Sampling(logprobs=logprobs))
            return await rpc.InferenceStub(channel).Complete(request)

    answer = asyncio.run(ask(2))
    assert [one.token_id for one in answer.logprobs] == list(answer.token_ids)
    assert {one.logprob for one in answer.logprobs} == {-0.5}
    assert [t.logprob for t in answer.logprobs[0].top] == [-0.5, -1.25]
    assert not asyncio.run(ask(None)).logprobs
    with pytest.raises(grpc.aio.AioRpcError, match="logprobs is 21; expected at most 20"):
        asyncio.run(ask(21))


def test_bytes_of_every_token() -> None:
    ids = TOKENIZER.encode_text("naïve 鯨 \\ \n whale")
    assert b"".join(TOKENIZER.bytes_of(i) or b"" for i in ids).decode() == "naïve 鯨 \\ \n whale"
    assert TOKENIZER.bytes_of(10**6) is None
    assert torch.tensor([len(TOKENIZER.bytes_of(i) or b"") for i in range(300)]).min() >= 1
