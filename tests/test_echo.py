"""Prompts that come back over both protocols, with what is told of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from edge import TOKENIZER, Edge, edge, served
from engines import Scripted

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT, PROMPT = " past", "The whale é"
IDS = TOKENIZER.encode_text(TEXT)
PROMPT_IDS = [0, *TOKENIZER.encode_text(PROMPT)]


def ask(path: str, body: dict[str, Any], tokenizer: Any = TOKENIZER) -> Any:
    async def run() -> Any:
        async with (
            edge(Scripted(IDS), tokenizer) as servers,
            httpx.AsyncClient() as client,
        ):
            answer = await client.post(f"{servers.http}{path}", json={"model": "tiny", **body})
        if body.get("stream"):
            events = [e[6:] for e in answer.text.split("\n\n") if e.startswith("data: {")]
            return [json.loads(event) for event in events]
        return answer.json()

    return asyncio.run(run())


def test_the_prompt_comes_before_the_text() -> None:
    body = {"prompt": PROMPT, "echo": True, "max_tokens": len(IDS), "return_token_ids": True}
    answer = ask(COMPLETIONS, body)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT + TEXT
    assert choice["token_ids"] == PROMPT_IDS + IDS
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == len(IDS)
    ids = ask(COMPLETIONS, {**body, "prompt": PROMPT_IDS[1:]})["choices"][0]
    assert ids["text"] == PROMPT + TEXT
    chunks = ask(COMPLETIONS, {**body, "stream": True})
    assert "".join(c["choices"][0]["text"] for c in chunks) == PROMPT + TEXT
    assert ask(COMPLETIONS, {**body, "echo": False})["choices"][0]["text"] == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_with_logprobs_the_first_token_has_none(stream: bool) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": len(IDS)}
    answer = ask(COMPLETIONS, {**body, "stream": stream})
    parts = answer if stream else [answer]
    lists = [part["choices"][0]["logprobs"] for part in parts]
    told = {name: [v for one in lists for v in one[name]] for name in lists[0]}
    count = len(PROMPT_IDS)
    assert told["tokens"] == [TOKENIZER.decode([i]) for i in PROMPT_IDS + IDS]
    assert told["token_logprobs"] == [
        None,
        *(i / -4 for i in range(1, count)),
        *[-0.5] * len(IDS),
    ]
    assert told["top_logprobs"][0] is None
    own = TOKENIZER.decode(PROMPT_IDS[1:2])
    best = {TOKENIZER.decode([i]): -0.125 for i in (300, 301)}
    assert told["top_logprobs"][1] == {own: -0.25, **best}
    # The token that the server puts before a text is not in the text.
    assert told["text_offset"][:2] == [0, 0]
    assert told["text_offset"][2] == len(own)


def test_a_prompt_alone_is_told_of() -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = ask(COMPLETIONS, body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["token_logprobs"]) == len(PROMPT_IDS)
    assert choice["logprobs"]["top_logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0
    chunks = ask(COMPLETIONS, {**body, "stream": True})
    assert [c["choices"][0]["text"] for c in chunks] == [PROMPT]


def vllm(count: int, ids: list[int]) -> list[Any]:
    """What vLLM's field holds."""
    found: list[Any] = [None]
    for i, token in enumerate(ids[1:], 1):
        own = {"logprob": i / -4, "rank": 2, "decoded_token": TOKENIZER.decode([token])}
        others = {
            str(300 + k): {
                "logprob": -0.125,
                "rank": k + 1,
                "decoded_token": TOKENIZER.decode([300 + k]),
            }
            for k in range(count)
        }
        found.append({str(token): own, **others})
    return found


def test_prompt_logprobs_are_vllms() -> None:
    body = {"prompt": PROMPT, "prompt_logprobs": 2, "max_tokens": 2}
    (choice,) = ask(COMPLETIONS, body)["choices"]
    assert choice["prompt_logprobs"] == vllm(2, PROMPT_IDS)
    assert next(iter(choice["prompt_logprobs"][1])) == str(PROMPT_IDS[1])
    assert choice["logprobs"] is None
    first, *rest = ask(COMPLETIONS, {**body, "stream": True})
    assert first["choices"][0]["prompt_logprobs"] == vllm(2, PROMPT_IDS)
    assert not any("prompt_logprobs" in chunk["choices"][0] for chunk in rest)
    assert "prompt_logprobs" not in ask(COMPLETIONS, {"prompt": PROMPT})["choices"][0]


def test_both_forms_may_ask_for_different_numbers() -> None:
    body = {"prompt": PROMPT, "prompt_logprobs": 3, "echo": True, "logprobs": 1, "max_tokens": 1}
    (choice,) = ask(COMPLETIONS, body)["choices"]
    assert choice["prompt_logprobs"] == vllm(3, PROMPT_IDS)
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2


def test_chat_tells_beside_the_choices() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 1, "n": 2}
    answer = ask(CHAT, body)
    count = answer["usage"]["prompt_tokens"]
    assert len(answer["prompt_logprobs"]) == count
    assert answer["prompt_logprobs"][1:] == [
        row for row in answer["prompt_logprobs"] if row and len(row) == 2
    ]
    chunks = ask(CHAT, {**body, "stream": True})
    assert [len(c["prompt_logprobs"]) for c in chunks if "prompt_logprobs" in c] == [count]
    nothing = ask(CHAT, {**body, "max_tokens": 0})
    assert [c["message"]["content"] for c in nothing["choices"]] == ["", ""]


def test_every_choice_has_the_prompt_before_it() -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "n": 2, "max_tokens": 2}
    whole = ask(COMPLETIONS, body)["choices"]
    assert [c["text"].startswith(PROMPT) for c in whole] == [True, True]
    assert whole[0]["logprobs"] == whole[1]["logprobs"]
    chunks = ask(COMPLETIONS, {**body, "stream": True})
    for i in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in own) == whole[i]["text"]
        assert own[0]["logprobs"]["token_logprobs"][0] is None


def test_without_a_tokenizer_ids_come_back() -> None:
    body = {"prompt": [5, 6], "echo": True, "prompt_logprobs": 0, "max_tokens": 1}
    (choice,) = ask(COMPLETIONS, body, None)["choices"]
    assert choice["text"] == ""
    assert choice["token_ids"] == [5, 6, IDS[0]]
    told = {"6": {"logprob": -0.25, "rank": 2, "decoded_token": None}}
    assert choice["prompt_logprobs"] == [None, told]


def test_the_engine_is_asked_by_the_first_choice_alone() -> None:
    engine = Scripted(IDS)

    async def act(servers: Edge) -> None:
        body = {"prompt": [5, 6], "prompt_logprobs": 4, "n": 3, "max_tokens": 1}
        async with httpx.AsyncClient() as client:
            await client.post(f"{servers.http}{COMPLETIONS}", json=body)

    served(engine, act)
    assert [r.prompt_logprobs for r in engine.requests] == [4, None, None]
