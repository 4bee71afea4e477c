"""The seam between whoever wants text and whatever makes it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from whalepod.engine.request import Request, TokenEvent


class EngineClient(Protocol):
    """Generate tokens for requests; implemented in-process and over Ray."""

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Yield the request's tokens in order, the last one with `finish` set.

        Closing the iterator cancels the request; everything it held is freed within one step.

        Raises:
            RequestError: the request can never fit (longer than the context).
            Overloaded: the queue is full; it says when to come back.
            NotReady: nothing serves now and the wait for it ran out.
        """
        ...

    async def ready(self) -> str | None:
        """Return None when requests are served now, else a sentence that says what is awaited."""
        ...
