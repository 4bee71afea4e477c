"""An engine that says what it is told to, for tests of what stands before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import numpy as np

from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.request import Request, TokenEvent


def told_of(request: Request) -> PromptLogprobs | None:
    """Token i of the prompt has -i / 4 and rank 2; the best ones are 300, 301, ... with -1/8 all."""
    count, rows = request.prompt_logprobs, len(request.prompt_ids) - 1
    if count is None:
        return None
    return PromptLogprobs(
        np.arange(1, rows + 1, dtype=np.float32) / -4,
        np.full(rows, 2, np.int32),
        np.tile(np.arange(300, 300 + count, dtype=np.int32), (rows, 1)),
        np.full((rows, count), -0.125, np.float32),
    )


class Scripted:
    """Answers every request with the same tokens; remembers requests and cancellations."""

    def __init__(self, tokens: Sequence[int] = (), pause_s: float = 0.0) -> None:
        self.tokens, self.pause_s = list(tokens), pause_s
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.failure: Exception | None = None
        self.late_failure: Exception | None = None
        self.reason: str | None = None
        self.cached = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        done, told = False, told_of(request)
        if not request.max_tokens:
            yield TokenEvent(request.id, 0, -1, 0.0, "length", None, self.cached, prompt=told)
            return
        try:
            for i, token in enumerate(self.tokens[: request.max_tokens]):
                await asyncio.sleep(self.pause_s)
                finish = None
                if token in request.stop_ids and not request.ignore_eos:
                    finish = "stop"
                elif i + 1 == min(request.max_tokens, len(self.tokens)):
                    finish = "length"
                done = finish is not None
                event = TokenEvent(request.id, i, token, -0.5, finish, None, self.cached)  # type: ignore[arg-type]
                yield event if i else replace(event, prompt=told)
                if done:
                    return
                if self.late_failure is not None:
                    raise self.late_failure
        finally:
            if not done:
                self.cancelled.append(request.id)

    async def ready(self) -> str | None:
        return self.reason
