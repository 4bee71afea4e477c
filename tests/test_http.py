"""The HTTP API over a scripted engine: answers, streams, and a table of bad requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from engines import Scripted

from whalepod.engine.request import Adjust
from whalepod.errors import NotReady, Overloaded
from whalepod.ingress.http import make_app
from whalepod.ingress.options import Options
from whalepod.ingress.service import Service
from whalepod.metrics import Metrics
from whalepod.model.shape import ModelConfig
from whalepod.model.tiny import preset_config
from whalepod.model.tiny_tokenizer import small_tokenizer
from whalepod.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer(small_tokenizer(1024))
MODEL = ModelConfig.from_dict(preset_config("tiny"))
TEXT = "The whale swam past 鲸 the harbour"
IDS = TOKENIZER.encode_text(TEXT)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def service(engine: Scripted, tokenizer: Tokenizer | None = TOKENIZER) -> Service:
    return Service(engine, tokenizer, "tiny", MODEL, 200, Metrics("tiny"))


def ask(
    engine: Scripted, *calls: tuple[str, Any], tokenizer: Tokenizer | None = TOKENIZER
) -> list[httpx.Response]:
    """POST each (path, body) in turn; bytes go as they are."""

    async def run() -> list[httpx.Response]:
        app = make_app(service(engine, tokenizer), max_body_bytes=10_000, default_thinking=False)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            found = []
            for path, body in calls:
                if body is None:
                    found.append(await client.get(path))
                elif isinstance(body, bytes):
                    headers = {"content-type": "application/json"}
                    found.append(await client.post(path, content=body, headers=headers))
                else:
                    found.append(await client.post(path, json=body))
            return found

    return asyncio.run(run())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_completion_whole_and_streamed() -> None:
    body = {"prompt": "x", "max_tokens": len(IDS), "stream_options": {"include_usage": True}}
    whole, streamed = ask(
        Scripted(IDS), (COMPLETIONS, body), (COMPLETIONS, {**body, "stream": True})
    )
    found = whole.json()
    assert found["object"] == "text_completion"
    assert found["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}
    ]
    assert found["usage"]["completion_tokens"] == len(IDS)
    assert found["usage"]["prompt_tokens"] == 1 + len(TOKENIZER.encode_text("x"))
    chunks = events(streamed)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == TEXT
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == found["usage"]


def test_sampling_settings_go_to_the_engine() -> None:
    engine = Scripted(IDS)
    body = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5}
    body |= {"logit_bias": {"7": -100}, "min_p": 0.1, "min_tokens": 1, "banned_token_ids": [9]}
    ask(engine, (COMPLETIONS, {"prompt": "x", "max_tokens": 2, **body}))
    sampling = engine.requests[0].sampling
    assert sampling.min_p == 0.1
    assert sampling.adjust == Adjust(0.5, -1, 1.5, ((7, -100),), (), (9,), 1, (1,))


def test_salt_goes_to_the_engine_and_cached_tokens_come_back() -> None:
    engine = Scripted(IDS)
    engine.cached = 1
    body = {"prompt": "x", "max_tokens": 2, "cache_salt": "me"}
    reply, metrics = ask(engine, (COMPLETIONS, body), ("/metrics", None))
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert engine.requests[0].cache_salt == "me"
    assert 'vllm:prefix_cache_queries_total{model_name="tiny"} 2.0' in metrics.text
    assert 'vllm:prefix_cache_hits_total{model_name="tiny"} 1.0' in metrics.text


def test_chat_splits_reasoning_from_the_answer() -> None:
    end, eos = TOKENIZER.control_id("</think>"), 1
    script = [*TOKENIZER.encode_text("hmm, 鲸"), end, *TOKENIZER.encode_text("Yes."), eos, 5]
    body = {"messages": [{"role": "user", "content": "?"}], "thinking": {"type": "enabled"}}
    whole, streamed = ask(Scripted(script), (CHAT, body), (CHAT, {**body, "stream": True}))
    choice = whole.json()["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "hmm, 鲸",
    }
    assert choice["finish_reason"] == "stop"
    deltas = [c["choices"][0]["delta"] for c in events(streamed)]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hmm, 鲸"
    assert "".join(d.get("content", "") for d in deltas) == "Yes."
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in d for d in deltas[1:])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("past", "The whale swam "),
        (["鲸 the", "harbour"], "The whale swam past "),
        ("zzz", TEXT),
        ("The", ""),
    ],
)
def test_stop_strings_never_appear_and_cancel_the_engine(
    stop: Any, expected: str, stream: bool
) -> None:
    engine = Scripted(IDS)
    body = {"prompt": "x", "max_tokens": len(IDS), "stop": stop, "stream": stream}
    (response,) = ask(engine, (COMPLETIONS, body))
    if stream:
        text = "".join(c["choices"][0]["text"] for c in events(response))
    else:
        text = response.json()["choices"][0]["text"]
    assert text == expected
    assert len(engine.cancelled) == (expected != TEXT)


def test_settings_reach_the_engine() -> None:
    engine = Scripted(IDS)
    ask(
        engine,
        (
            COMPLETIONS,
            {"prompt": [5, 6], "seed": -3, "top_k": -1, "temperature": 0, "max_tokens": 7},
        ),
        (COMPLETIONS, {"prompt": ["hi"], "top_p": 0.5, "stop_token_ids": [9], "ignore_eos": True}),
    )
    first, second = engine.requests
    assert first.prompt_ids == (5, 6)
    assert first.max_tokens == 7
    assert (first.sampling.temperature, first.sampling.top_k) == (0, 0)
    assert first.sampling.seed == -3 % (1 << 63)
    assert first.stop_ids == (1,)
    assert second.prompt_ids[0] == 0
    assert second.max_tokens == 200 - len(second.prompt_ids)
    assert second.sampling.top_p == 0.5
    assert second.stop_ids == (1, 9)
    assert second.ignore_eos


GOOD = {"prompt": "x", "max_tokens": 2}
HELLO = [{"role": "user", "content": "hi"}]
BAD: list[tuple[str, Any, int, str | None, str]] = [
    (COMPLETIONS, {}, 400, "prompt", "prompt is missing"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", "got 5"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "prompt", "prompt"),
    (
        COMPLETIONS,
        {"prompt": [5, 1024]},
        400,
        "prompt",
        "1024 is outside the vocabulary, 0 to 1023",
    ),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "-1 is outside"),
    (COMPLETIONS, {"prompt": [5] * 200}, 400, "prompt", "200 tokens and the context holds 200"),
    (COMPLETIONS, {"prompt": [5], "max_tokens": 200}, 400, "max_tokens", "at most 199"),
    (COMPLETIONS, {**GOOD, "max_tokens": 0}, 400, "max_tokens", "at least 1, or echo"),
    (COMPLETIONS, {**GOOD, "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    (COMPLETIONS, {**GOOD, "max_tokens": "7"}, 400, "max_tokens", "'7'"),
    (COMPLETIONS, {**GOOD, "max_tokens": 2.5}, 400, "max_tokens", "2.5"),
    (COMPLETIONS, {**GOOD, "temperature": -0.1}, 400, "temperature", "-0.1"),
    (COMPLETIONS, {**GOOD, "temperature": 2.1}, 400, "temperature", "2.1"),
    (COMPLETIONS, {**GOOD, "top_p": 0}, 400, "top_p", "greater than 0"),
    (COMPLETIONS, {**GOOD, "top_k": -2}, 400, "top_k", "-2"),
    (COMPLETIONS, {**GOOD, "stop": ""}, 400, "stop", "at least 1"),
    (COMPLETIONS, {**GOOD, "stop": ["a"] * 17}, 400, "stop", "16"),
    (COMPLETIONS, {**GOOD, "n": 0}, 400, "n", "greater than or equal to 1"),
    (COMPLETIONS, {**GOOD, "n": 129}, 400, "n", "less than or equal to 128 (got 129)"),
    (COMPLETIONS, {**GOOD, "best_of": 2}, 400, "best_of", "best_of is 2 and n is 1"),
    (COMPLETIONS, {**GOOD, "suffix": "y"}, 400, "suffix", "not supported yet"),
    (COMPLETIONS, {**GOOD, "prompt_logprobs": 21}, 400, "prompt_logprobs", "or equal to 20"),
    (COMPLETIONS, {**GOOD, "prompt_logprobs": -1}, 400, "prompt_logprobs", "or equal to 0"),
    (COMPLETIONS, {**GOOD, "logprobs": True}, 400, "logprobs", "valid integer"),
    (COMPLETIONS, {**GOOD, "presence_penalty": 2.5}, 400, "presence_penalty", "or equal to 2"),
    (COMPLETIONS, {**GOOD, "min_p": 1.5}, 400, "min_p", "or equal to 1"),
    (COMPLETIONS, {**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty", "greater than 0"),
    (COMPLETIONS, {**GOOD, "logit_bias": {"x": 1.0}}, 400, "logit_bias", "pattern"),
    (COMPLETIONS, {**GOOD, "logit_bias": {"4": 101.0}}, 400, "logit_bias", "or equal to 100"),
    (COMPLETIONS, {**GOOD, "logit_bias": {"99999": 1.0}}, 400, "logit_bias", "outside the vocab"),
    (COMPLETIONS, {**GOOD, "allowed_token_ids": []}, 400, "allowed_token_ids", "at least 1"),
    (COMPLETIONS, {**GOOD, "min_tokens": 99}, 400, "min_tokens", "exceeds max_tokens"),
    (COMPLETIONS, {**GOOD, "colour": "red"}, 400, "colour", "colour is not known here"),
    (COMPLETIONS, {**GOOD, "stream": "yes"}, 400, "stream", "'yes'"),
    (COMPLETIONS, {**GOOD, "seed": "a"}, 400, "seed", "'a'"),
    (COMPLETIONS, {**GOOD, "model": "gpt"}, 404, "model", "'gpt' is not served here; use 'tiny'"),
    (COMPLETIONS, [1], 400, None, "JSON list"),
    (COMPLETIONS, b"{", 400, None, "no JSON"),
    (COMPLETIONS, b'{"prompt": "\xff"}', 400, None, "UTF-8"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "prompt", "lone surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 400, None, "NaN"),
    (COMPLETIONS, b"[" * 9000, 400, None, "nested too deeply"),
    (COMPLETIONS, b"x" * 20_000_000, 413, None, "10000 bytes"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "root", "content": "x"}]}, 400, "messages", "'root'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "content is missing"),
    (CHAT, {"messages": HELLO, "tools": [{}]}, 400, "tools", "not supported yet"),
    (
        CHAT,
        {"messages": HELLO, "reasoning_effort": "max"},
        400,
        "reasoning_effort",
        "not supported",
    ),
    (CHAT, {"messages": HELLO, "thinking": {"type": "maybe"}}, 400, "thinking", "'maybe'"),
    (
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "content": "x"}]},
        400,
        "messages",
        "prefix",
    ),
    ("/v1/nothing", GOOD, 404, None, "no such path"),
    (COMPLETIONS, None, 405, None, "does not take that method"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "fact"), BAD)
def test_bad_requests_are_explained_and_the_server_goes_on(
    path: str, body: Any, status: int, param: str | None, fact: str
) -> None:
    bad, good = ask(Scripted(IDS), (path, body), (COMPLETIONS, GOOD))
    assert bad.status_code == status, bad.text
    error = bad.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert fact in error["message"]
    assert good.status_code == 200


def test_engine_faults_have_their_own_status_and_no_traceback() -> None:
    for failure, status, retry in (
        (Overloaded("full", 2.0), 429, "2"),
        (NotReady("nobody"), 503, "1"),
        (ZeroDivisionError("secret"), 500, None),
    ):
        engine = Scripted(IDS)
        engine.failure = failure
        for stream in (False, True):
            (response,) = ask(engine, (COMPLETIONS, {**GOOD, "stream": stream}))
            assert response.status_code == status
            assert response.headers.get("retry-after") == retry
            assert "secret" not in response.text


def test_a_fault_in_a_stream_becomes_an_event() -> None:
    engine = Scripted(IDS)
    engine.late_failure = NotReady("the pool went away")
    (response,) = ask(engine, (COMPLETIONS, {**GOOD, "stream": True}))
    assert response.status_code == 200
    assert events(response)[-1]["error"]["message"] == "the pool went away"


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    ids, text, chat = ask(
        Scripted([7, 8, 9]),
        (COMPLETIONS, {"prompt": [5], "max_tokens": 3}),
        (COMPLETIONS, GOOD),
        (CHAT, {"messages": HELLO}),
        tokenizer=None,
    )
    assert ids.json()["choices"][0]["token_ids"] == [7, 8, 9]
    for response in (text, chat):
        assert response.status_code == 400
        assert "no tokenizer" in response.json()["error"]["message"]


def test_state_endpoints() -> None:
    engine = Scripted(IDS)
    engine.reason = "waiting for an expert member"
    done, health, ready, models, version, metrics = ask(
        engine,
        (COMPLETIONS, GOOD),
        *((p, None) for p in ("/health", "/ready", "/v1/models", "/version", "/metrics")),
    )
    assert done.status_code == health.status_code == version.status_code == 200
    assert ready.status_code == 503
    assert ready.json()["reason"] == engine.reason
    assert models.json()["data"][0]["id"] == "tiny"
    text = metrics.text
    assert 'vllm:generation_tokens_total{model_name="tiny"} 2.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text


def test_a_client_that_goes_away_cancels_its_request() -> None:
    async def run() -> Scripted:
        engine = Scripted(IDS * 50, pause_s=0.01)
        generation = service(engine).complete([5], Options(max_tokens=100))
        async for _ in generation.deltas:
            break
        await generation.deltas.aclose()
        return engine

    assert len(asyncio.run(run()).cancelled) == 1
