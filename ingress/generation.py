"""Requests under way: from the engine's events to text deltas, of one choice or of several."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from whalepod.engine.client import EngineClient
from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.request import FinishReason, Request, TokenEvent
from whalepod.engine.trial import Trial
from whalepod.errors import DeadlineExceeded, NotReady, Overloaded, RequestError, WhalepodError
from whalepod.ingress.assembler import Assembler, Delta, Finish
from whalepod.ingress.deadline import within
from whalepod.ingress.structured import check_grammar
from whalepod.ingress.together import together
from whalepod.metrics import Metrics, Stopwatch


class EngineFailed(WhalepodError):
    """The engine ended a request without a result; the message says why."""


@dataclass(slots=True)
class Usage:
    """Token counts of one request; of `drafted_tokens` guesses, `accepted_tokens` are in the answer.

    The prompt counts once, whatever the number of choices, and the tokens of all choices count.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, event: TokenEvent) -> None:
        """Count one more token."""
        self.completion_tokens += event.token >= 0
        self.drafted_tokens += event.drafted
        self.accepted_tokens += event.accepted


@dataclass(slots=True)
class Generation:
    """A request under way: iterate `deltas`, close it to cancel; `usage` counts along.

    From the first delta on, `prompt` is what the engine tells of the prompt, where it is asked.

    Iterating raises what `EngineClient.generate` raises, and EngineFailed.
    """

    id: str
    usage: Usage
    prompt_ids: Sequence[int]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt: PromptLogprobs | None = None
    deltas: AsyncGenerator[Delta, None] = field(init=False)


@dataclass(slots=True)
class Choice:
    """One of a request's answers: what is asked of the engine, and the text that becomes of it."""

    index: int
    request: Request
    assembler: Assembler


class Runner:
    """Runs the choices of one generation; the first computes the prompt, the others find it known.

    Args:
        trial: tries the request's grammar, if it has one.
    """

    def __init__(
        self, client: EngineClient, metrics: Metrics, trial: Trial | None, generation: Generation
    ) -> None:
        self._client, self._metrics, self._trial = client, metrics, trial
        self._generation = generation
        self._begun, self._started = asyncio.Event(), time.monotonic()

    def deltas(self, choices: Sequence[Choice]) -> AsyncGenerator[Delta, None]:
        """The deltas of all, as they come; the first choice is admitted for all of them."""
        first, *others = choices
        if not others:
            return self._run(first)
        return together([self._run(first), *(self._follow(choice) for choice in others)])

    async def _follow(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        """As `_run`, once the first choice has begun, in the time that is left."""
        await self._begun.wait()
        if (limit := choice.request.timeout_s) is not None:
            left = max(0.0, limit - (time.monotonic() - self._started))
            choice.request = dataclasses.replace(choice.request, timeout_s=left)
        async with aclosing(self._run(choice)) as deltas:
            async for delta in deltas:
                yield delta

    async def _run(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        watch = Stopwatch(self._metrics, self._generation.usage.prompt_tokens)
        reason, refusal = "abort", None
        try:
            last = None
            async with aclosing(self._unfinished(choice, watch)) as deltas:
                async for delta in deltas:
                    if delta.finish is not None:
                        last = delta
                        break
                    yield delta
            if last is None or last.finish is None:
                raise EngineFailed("the engine's stream broke off; send the request again")
            # The engine is let go before the last delta is out, however slow the client.
            reason = last.finish
            yield last
        except DeadlineExceeded:
            reason = "deadline"
            raise
        except Exception as error:
            reason, refusal = "error", None if watch.begun else _refusal(error)
            raise
        finally:
            if refusal is not None:
                watch.refuse(refusal)
            else:
                watch.end(reason)

    async def _unfinished(self, choice: Choice, watch: Stopwatch) -> AsyncGenerator[Delta, None]:
        """Deltas that have something to tell; stop at the one with `finish`."""
        request = choice.request
        await check_grammar(self._trial, request)
        events = within(self._client.generate(request), request.timeout_s)
        async with aclosing(events):
            async for event in events:
                finish = _verdict(event)
                self._count(choice, event, watch)
                is_end = finish == "stop" and not request.ignore_eos
                if event.token < 0:  # none was asked for
                    yield Delta(finish=finish, index=choice.index)
                    continue
                delta = choice.assembler.push(event, finish, is_end)
                if not delta.is_empty:
                    yield delta

    def _count(self, choice: Choice, event: TokenEvent, watch: Stopwatch) -> None:
        generation, usage = self._generation, self._generation.usage
        usage.add(event)
        if not watch.begun:
            cached = min(event.cached, usage.prompt_tokens)
            self._metrics.prefix_queries.inc(usage.prompt_tokens)
            self._metrics.prefix_hits.inc(cached)
            if choice.index == 0:
                usage.cached_tokens, generation.prompt = cached, event.prompt
                self._begun.set()
        if event.token < 0:
            watch.begin(event.queued_s, event.preempted)
            return
        watch.token(
            queued_s=event.queued_s,
            preempted=event.preempted,
            drafted=event.drafted,
            accepted=event.accepted,
        )


def further(first: Request, index: int) -> Request:
    """The request for a further choice: as `first` alone would be with a seed larger by `index`."""
    seed = (first.sampling.seed + index) % (1 << 63)
    return dataclasses.replace(
        first,
        id=f"{first.id}-{index}",
        sampling=dataclasses.replace(first.sampling, seed=seed),
        prompt_logprobs=None,
        copies=1,
        replayed=True,
    )


def _refusal(error: Exception) -> str | None:
    kinds = ((RequestError, "invalid"), (Overloaded, "overloaded"), (NotReady, "not_ready"))
    return next((name for kind, name in kinds if isinstance(error, kind)), None)


def _verdict(event: TokenEvent) -> Finish | None:
    finish: FinishReason | None = event.finish
    if finish == "deadline":
        raise DeadlineExceeded(event.error or "the request's time was over")
    if finish == "error" or finish == "abort":
        raise EngineFailed(event.error or "the engine gave the request up; send it again")
    return finish
