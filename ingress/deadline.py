"""A request's own time limit, kept on this side too: the engine's word may come late or never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from whalepod.engine.request import TokenEvent
from whalepod.errors import DeadlineExceeded


async def within(
    events: AsyncGenerator[TokenEvent, None], seconds: float | None
) -> AsyncGenerator[TokenEvent, None]:
    """Yield `events` for at most so many seconds from now (None: without an end), then close them.

    Raises:
        DeadlineExceeded: they had not ended by then.
    """
    loop = asyncio.get_running_loop()
    ends = None if seconds is None else loop.time() + seconds
    async with aclosing(events):
        while True:
            try:
                left = None if ends is None else max(0.0, ends - loop.time())
                event = await (
                    anext(events) if left is None else asyncio.wait_for(anext(events), left)
                )
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the request was not done within its {seconds:g} s; give it more time, or ask "
                    "for fewer tokens"
                ) from None
            yield event
