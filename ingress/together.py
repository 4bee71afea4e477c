"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None = None


async def together(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield what streams yield, as it comes; closing it closes all of them.

    Raises:
        Exception: what the first stream to fail raised; the others are closed.
    """
    # Each stream has one item here at most: they take turns, and a slow reader holds them all up.
    queue: asyncio.Queue[tuple[T | _End, asyncio.Semaphore]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        turn, error = asyncio.Semaphore(), None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await turn.acquire()
                    queue.put_nowait((item, turn))
        except Exception as failure:
            error = failure
        queue.put_nowait((_End(error), turn))

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            item, turn = await queue.get()
            turn.release()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
