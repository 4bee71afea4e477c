"""The life of requests on an attention member, from submission to the last token.

Other threads submit and cancel; one thread plans steps and takes their results in.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from whalepod.engine.admission import Limits, Pace
from whalepod.engine.foresight import foresee
from whalepod.engine.grammar import Grammars
from whalepod.engine.held import Held
from whalepod.engine.payoff import Payoff
from whalepod.engine.plan import Plan
from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.request import Request, Sequence, TokenEvent
from whalepod.engine.sampler import Drawn
from whalepod.engine.scheduler import Scheduler
from whalepod.engine.step import split
from whalepod.errors import RequestError

log = logging.getLogger(__name__)

_TOO_COMPLEX = "the grammar takes more work for a token than is allowed; simplify it"
_NOT_FINITE = (
    "the model's logits for this request are not finite (NaN or infinite); send it again, and if that "
    "fails too, check the weights and the health of the devices"
)


@dataclass(slots=True)
class Counters:
    """Totals since start."""

    steps: int = 0
    tokens: int = 0
    generated: int = 0
    foreseen: int = 0  # of the steps, how many were launched before the one before had been drawn
    drafted: int = 0
    accepted: int = 0


class EngineLoop:
    """Queues, plans and results. `emit` is called from the planning thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        emit: Callable[[TokenEvent], None],
        *,
        max_queue: int,
        max_context: int,
        max_queue_tokens: int = 1 << 20,
        draft_tokens: int = 0,
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler, self.emit = scheduler, emit
        self.limits, self.pace = Limits(max_queue, max_queue_tokens), Pace()
        self.max_context = max_context
        self.wake = threading.Event()
        self.ring: Callable[[], None] = lambda: None
        self.held = Held(grammars, self._rouse)
        self.counters = Counters()
        self.payoff = Payoff(draft_tokens)
        self._inbox: deque[Sequence | str] = deque()
        self._live: dict[str, Sequence] = {}
        self._timed: dict[str, Sequence] = {}
        # Since when there has been work without a break, and how many requests have ended in it.
        self._since: float | None = None
        self._ended = 0

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._live) + len(self._inbox)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._inbox) or self.scheduler.busy or self.held.ready

    @property
    def waiting(self) -> int:
        """Requests that no slot is free for."""
        return self._waiting_with(0)

    def _waiting_with(self, more: int) -> int:
        """As `waiting`, with `more` requests and those that are to follow others of the same prompt."""
        scheduler = self.scheduler
        known = [*self._live.values(), *(s for s in list(self._inbox) if isinstance(s, Sequence))]
        copies = sum(s.request.copies - 1 for s in known if not s.generated)
        waiting = len(scheduler.waiting) + len(self._inbox) + copies + more
        return max(0, waiting - scheduler.slots.free)

    @property
    def backlog(self) -> int:
        """Tokens of prompts that are not computed yet."""
        new = [item for item in list(self._inbox) if isinstance(item, Sequence)]
        known = [*self.scheduler.waiting, *self.scheduler.running]
        return sum(s.pending for s in (*new, *known) if s.pending > 1)

    def check(self, request: Request) -> None:
        """Raise RequestError or Overloaded if this request cannot be taken."""
        total = len(request.prompt_ids) + request.max_tokens
        if total > self.max_context or not self.scheduler.fits(total):
            room = min(self.max_context, self.scheduler.blocks.size * self.scheduler.block_tokens)
            raise RequestError(
                f"{len(request.prompt_ids)} prompt tokens + max_tokens {request.max_tokens} "
                f"= {total} exceed the context of {room}; shorten one of them",
                "max_tokens",
            )
        self.held.check(request)
        if not request.replayed:
            room = self.scheduler.slots.size + self.limits.requests
            if request.copies > room:
                raise RequestError(
                    f"n is {request.copies}, and this server takes at most {room} at a time "
                    "(engine.max_batch and engine.max_queue); ask for fewer",
                    "n",
                )
            waiting = self._waiting_with(request.copies - 1)
            prompts = len(request.prompt_ids) * self.scheduler.room.prompts(request.copies)
            self.limits.check(waiting, self.backlog, prompts, self.pace)

    def submit(self, request: Request) -> None:
        """Queue a request; from any thread. Raises what `check` raises."""
        self.check(request)
        self._inbox.append(Sequence(request, time.monotonic()))
        self._rouse()

    def _rouse(self) -> None:
        self.wake.set()
        self.ring()

    def cancel(self, request_id: str) -> None:
        """End a request before its time; from any thread. Unknown ids are ignored."""
        self._inbox.append(request_id)
        self.wake.set()

    def plan(self, micro_batches: int, least_rows: int = 1) -> Plan | None:
        """Choose the next step; None when nothing waits.

        Args:
            micro_batches: split it into at most this many.
            least_rows: but not into smaller ones than this on average.
        """
        now = time.monotonic()
        self._take_in()
        self._expire(now)
        running = len(self.scheduler.running)
        self.scheduler.drafts = drafts = self.payoff.choose(running)
        planned = self.scheduler.plan()
        if not planned:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        for sequence in (s for s, _ in planned if not s.begun):
            sequence.tally.queued_s = now - sequence.submitted
        parts = [part for _, part in planned]
        rows = sum(len(part.ids) for part in parts)
        return Plan(split(parts, min(micro_batches, rows // least_rows)), planned, running, drafts)

    def foresee(self, plan: Plan) -> Plan | None:
        """The step after `plan`, which is under way; None where something else is to be decided first."""
        now = time.monotonic()
        late = any(s.deadline is not None and now > s.deadline for s in self._timed.values())
        if self._inbox or self.held.ready or late:
            return None
        return foresee(self.scheduler, plan)

    def finish(
        self,
        plan: Plan,
        drawn: list[Drawn],
        drafts: Mapping[int, list[int]] | None = None,
        told: Seq[PromptLogprobs] = (),
    ) -> None:
        """Take a completed step's tokens in.

        Args:
            drawn: in the order of the parts that draw, one for a part and each of its drafts.
            drafts: guesses at what comes after each slot's new tokens.
            told: in the order of the parts that tell of their prompts.
        """
        telling = (p for m in plan.step.micro_batches for p in m.parts if p.tell is not None)
        for part, rows in zip(telling, told, strict=True):
            self._learn(plan.by_slot[part.slot], rows)
        before, emitted, here = self.counters.generated, plan.emitted(drawn), plan.here
        right = {slot: len(made) - 1 for slot, made in emitted.items() if len(made) > 1}
        self.counters.accepted += sum(right.values())
        self.counters.drafted += sum(part.drafts for _, part in here)
        self.scheduler.advance(here, right)
        for slot, made in emitted.items():
            sequence = plan.by_slot[slot]
            sequence.drafts = list(drafts.get(slot, ())) if drafts else []
            self._accept(sequence, made)
        for sequence in (s for s, part in here if part.draw is None and not s.pending):
            self._forget(sequence)
            self.emit(sequence.end())
        self.counters.steps += 1
        self.counters.tokens += sum(len(part.ids) for _, part in here)
        prompts = sum(len(p.ids) for _, p in here if len(p.ids) > 1 + p.drafts)
        self._measure(prompts)
        if not prompts:
            took, count = time.perf_counter() - plan.begun, self.counters.generated - before
            self.payoff.learn(plan.running, plan.verifies, took, count)

    def _learn(self, sequence: Sequence, told: PromptLogprobs) -> None:
        if told.finite:
            sequence.learn(told)
        else:
            self._fail_spoilt(sequence)

    def _accept(self, sequence: Sequence, drawn: list[Drawn]) -> None:
        for i, got in enumerate(drawn):
            sequence.tally.accepted = int(i + 1 < len(drawn))
            if got.token < 0:
                if math.isfinite(got.logprob):
                    self._fail(sequence, _TOO_COMPLEX)
                else:
                    self._fail_spoilt(sequence)
                return
            event = sequence.accept(got.token, got.logprob, got.alternatives)
            self.counters.generated += 1
            if event.finish is not None:
                self._forget(sequence)
            self.emit(event)
            if event.finish is not None:
                return

    def abort_all(self, reason: str) -> None:
        """End every request with finish `error` (the member is going away for good)."""
        self._take_in()
        for sequence in list(self._live.values()):
            self._fail(sequence, reason)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._forget(sequence)
        self.emit(_end(sequence, "error", reason))

    def _fail_spoilt(self, sequence: Sequence) -> None:
        """Of a spoilt cache others who began alike would get spoilt logits too."""
        log.warning("request %s: %s", sequence.request.id, _NOT_FINITE)
        self._fail(sequence, _NOT_FINITE)
        self.scheduler.room.prefixes.forget(sequence.request.cache_salt)

    def _take_in(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                self._live[item.request.id] = item
                if item.deadline is not None:
                    self._timed[item.request.id] = item
                if not self.held.holds(item):
                    self.scheduler.add(item)
            elif item in self._live:
                sequence = self._live[item]
                self._forget(sequence)
                self.emit(_end(sequence, "abort", None))

        for sequence, problem in self.held.take():
            if problem is None:
                self.scheduler.add(sequence)
            else:
                self._fail(sequence, problem)

    def _expire(self, now: float) -> None:
        """End what is past its deadline, whether it waits or runs."""
        late = [s for s in self._timed.values() if s.deadline is not None and now > s.deadline]
        for sequence in late:
            self._forget(sequence)
            said = f"not done within {sequence.request.timeout_s:g} s of its submission"
            self.emit(_end(sequence, "deadline", said))

    def _measure(self, prompt_tokens: int) -> None:
        now = time.monotonic()
        self.pace.learn(now - (self._since or now), self._ended, prompt_tokens)
        self._since, self._ended = now if self.busy else None, 0

    def _forget(self, sequence: Sequence) -> None:
        self._live.pop(sequence.request.id, None)
        self._timed.pop(sequence.request.id, None)
        self._ended += 1
        self.scheduler.drop(sequence)
        self.held.drop(sequence)


def _end(
    sequence: Sequence, finish: Literal["abort", "error", "deadline"], reason: str | None
) -> TokenEvent:
    return TokenEvent(sequence.request.id, sequence.generated, -1, 0.0, finish, reason)
