"""An engine that says what it is told to, for tests of what stands before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from whalepod.engine.request import Request, TokenEvent


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
        done = False
        try:
            for i, token in enumerate(self.tokens[: request.max_tokens]):
                await asyncio.sleep(self.pause_s)
                finish = None
                if token in request.stop_ids and not request.ignore_eos:
                    finish = "stop"
                elif i + 1 == min(request.max_tokens, len(self.tokens)):
                    finish = "length"
                done = finish is not None
                yield TokenEvent(request.id, i, token, -0.5, finish, None, self.cached)  # type: ignore[arg-type]
                if done:
                    return
                if self.late_failure is not None:
                    raise self.late_failure
        finally:
            if not done:
                self.cancelled.append(request.id)

    async def ready(self) -> str | None:
        return self.reason
