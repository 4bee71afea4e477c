"""Responses in the OpenAI dialect, whole or as chunks, from one generation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from whalepod.ingress.assembler import Chosen
from whalepod.ingress.logprobs import Told
from whalepod.ingress.objects import choice, envelope, usage
from whalepod.ingress.openai import ChatBody, Common, CompletionBody
from whalepod.ingress.service import Generation, Service


class Reply(Protocol):
    """A response under way."""

    async def whole(self) -> dict[str, Any]:
        """Wait for the end and build one object."""
        ...

    def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield chunk objects as text comes; the first one only once the engine has begun."""
        ...


class CompletionReply:
    """`text_completion` objects."""

    def __init__(self, service: Service, generation: Generation, body: CompletionBody) -> None:
        self._service, self._generation, self._body = service, generation, body
        self._ids = body.return_token_ids or service.tokenizer is None
        self._told = Told(service.tokenizer, body.logprobs_wanted)

    async def whole(self) -> dict[str, Any]:
        """See `Reply.whole`."""
        text: list[str] = []
        tokens: list[int] = []
        chosen: list[Chosen] = []
        finish = None
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                text.append(delta.content)
                tokens += delta.tokens
                chosen += delta.chosen
                finish = delta.finish
        fields = {"text": "".join(text), **self._token_ids(tokens)}
        return {
            **self._envelope(),
            "choices": [choice(finish, self._told.completion(chosen), **fields)],
            "usage": usage(self._generation),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Reply.chunks`."""
        head = {**self._envelope(), **_usage_field(self._body)}
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                fields = {"text": delta.content, **self._token_ids(list(delta.tokens))}
                told = self._told.completion(delta.chosen)
                yield {**head, "choices": [choice(delta.finish, told, **fields)]}
        if self._body.usage_wanted:
            yield {**head, "choices": [], "usage": usage(self._generation)}

    def _envelope(self) -> dict[str, Any]:
        return envelope("text_completion", "cmpl", self._generation, self._service.model_name)

    def _token_ids(self, tokens: list[int]) -> dict[str, Any]:
        return {"token_ids": tokens} if self._ids else {}


class ChatReply:
    """`chat.completion` objects; reasoning goes into `reasoning_content`."""

    def __init__(self, service: Service, generation: Generation, body: ChatBody) -> None:
        self._service, self._generation, self._body = service, generation, body
        self._told = Told(service.tokenizer, body.logprobs_wanted)

    async def whole(self) -> dict[str, Any]:
        """See `Reply.whole`."""
        content: list[str] = []
        reasoning: list[str] = []
        chosen: list[Chosen] = []
        finish = None
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                content.append(delta.content)
                reasoning.append(delta.reasoning)
                chosen += delta.chosen
                finish = delta.finish
        message = {
            "role": "assistant",
            "content": "".join(content),
            "reasoning_content": "".join(reasoning) or None,
        }
        return {
            **self._envelope("chat.completion"),
            "choices": [choice(finish, self._told.chat(chosen), message=message)],
            "usage": usage(self._generation),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Reply.chunks`."""
        head = {**self._envelope("chat.completion.chunk"), **_usage_field(self._body)}
        first = True
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                fields: dict[str, Any] = {"role": "assistant"} if first else {}
                first = False
                if delta.reasoning:
                    fields["reasoning_content"] = delta.reasoning
                if delta.content:
                    fields["content"] = delta.content
                told = self._told.chat(delta.chosen)
                yield {**head, "choices": [choice(delta.finish, told, delta=fields)]}
        if self._body.usage_wanted:
            yield {**head, "choices": [], "usage": usage(self._generation)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return envelope(kind, "chatcmpl", self._generation, self._service.model_name)


def _usage_field(body: Common) -> dict[str, None]:
    """With a usage chunk to come, every other chunk has the field too, empty."""
    return {"usage": None} if body.usage_wanted else {}
