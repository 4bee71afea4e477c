"""Responses in the OpenAI dialect, whole or as chunks, from one generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from whalepod.ingress.assembler import Delta, added
from whalepod.ingress.generation import Generation
from whalepod.ingress.logprobs import Told
from whalepod.ingress.objects import choice, envelope, usage
from whalepod.ingress.openai import ChatBody, Common, CompletionBody
from whalepod.ingress.service import Service

# Of more values than this, what is told of a prompt is written on a thread.
_MANY = 4096


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
        self._told: dict[int, Told] = {}

    async def whole(self) -> dict[str, Any]:
        """See `Reply.whole`."""
        choices = await gathered(self._generation)
        return {
            **self._envelope(),
            "choices": [await self._choice(choice) for choice in choices],
            "usage": usage(self._generation),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Reply.chunks`."""
        head = {**self._envelope(), **_usage_field(self._body)}
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                yield {**head, "choices": [await self._choice(delta)]}
        if self._body.usage_wanted:
            yield {**head, "choices": [], "usage": usage(self._generation)}

    def _envelope(self) -> dict[str, Any]:
        return envelope("text_completion", "cmpl", self._generation, self._service.model_name)

    async def _choice(self, delta: Delta) -> dict[str, Any]:
        """A choice, or the next part of it; what is asked of the prompt is in the first part."""
        told, body, generation = self._told.get(delta.index), self._body, self._generation
        text, tokens, chosen, unseen, fields = delta.content, delta.tokens, delta.chosen, 0, {}
        if told is None:
            told = Told(self._service.tokenizer, body.logprobs_wanted)
            self._told[delta.index] = told
            if body.echoes:
                ids = generation.prompt_ids
                text, tokens = self._prompt_text() + text, (*ids, *tokens)
                # The server has put the first token before a text; it is told but not seen.
                unseen = int(isinstance(body.prompt, str))
                chosen = (*told.echoed(ids, generation.prompt), *chosen)
            if delta.index == 0:
                fields = await prompt_field(told, generation, body)
        if self._ids:
            fields["token_ids"] = list(tokens)
        logprobs = told.completion(chosen, unseen)
        return choice(delta.index, delta.finish, logprobs, text=text, **fields)

    def _prompt_text(self) -> str:
        prompt, tokenizer = self._body.prompt, self._service.tokenizer
        if isinstance(prompt, str):
            return prompt
        return tokenizer.decode(prompt) if tokenizer is not None else ""


class ChatReply:
    """`chat.completion` objects; reasoning goes into `reasoning_content`."""

    def __init__(self, service: Service, generation: Generation, body: ChatBody) -> None:
        self._service, self._generation, self._body = service, generation, body
        self._told = Told(service.tokenizer, body.logprobs_wanted)

    async def whole(self) -> dict[str, Any]:
        """See `Reply.whole`."""
        choices = []
        for one in await gathered(self._generation):
            message = {
                "role": "assistant",
                "content": one.content,
                "reasoning_content": one.reasoning or None,
            }
            told = self._told.chat(one.chosen)
            choices.append(choice(one.index, one.finish, told, message=message))
        return {
            **self._envelope("chat.completion"),
            "choices": choices,
            **await prompt_field(self._told, self._generation, self._body),
            "usage": usage(self._generation),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Reply.chunks`."""
        head = {**self._envelope("chat.completion.chunk"), **_usage_field(self._body)}
        begun: set[int] = set()
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                fields: dict[str, Any] = {} if delta.index in begun else {"role": "assistant"}
                if delta.reasoning:
                    fields["reasoning_content"] = delta.reasoning
                if delta.content:
                    fields["content"] = delta.content
                told = self._told.chat(delta.chosen)
                chunk = {**head, "choices": [choice(delta.index, delta.finish, told, delta=fields)]}
                if not begun:
                    chunk |= await prompt_field(self._told, self._generation, self._body)
                begun.add(delta.index)
                yield chunk
        if self._body.usage_wanted:
            yield {**head, "choices": [], "usage": usage(self._generation)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return envelope(kind, "chatcmpl", self._generation, self._service.model_name)


async def gathered(generation: Generation) -> list[Delta]:
    """Wait for the end; all deltas of each choice as one, in the order of the choices."""
    parts: dict[int, list[Delta]] = {}
    async with aclosing(generation.deltas) as deltas:
        async for delta in deltas:
            parts.setdefault(delta.index, []).append(delta)
    return [added(parts[index]) for index in sorted(parts)]


async def prompt_field(told: Told, generation: Generation, body: Common) -> dict[str, Any]:
    """`prompt_logprobs`, where the request asks for them."""
    count, found, ids = body.prompt_logprobs, generation.prompt, generation.prompt_ids
    if count is None or found is None:
        return {}
    many = len(ids) * (1 + count) > _MANY
    rows = await asyncio.to_thread(told.prompt, ids, found, count) if many else None
    return {"prompt_logprobs": rows or told.prompt(ids, found, count)}


def _usage_field(body: Common) -> dict[str, None]:
    """With a usage chunk to come, every other chunk has the field too, empty."""
    return {"usage": None} if body.usage_wanted else {}
