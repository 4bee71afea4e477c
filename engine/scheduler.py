"""Decide what the next step computes: decodes first, then prefill chunks, within a token budget."""

from __future__ import annotations

from collections import deque

from whalepod.engine.blocks import BlockPool
from whalepod.engine.request import Sequence
from whalepod.engine.step import Part


class Scheduler:
    """Queues of one attention member, and the room they share.

    Requests are admitted in order of arrival. A sequence takes blocks as it grows; when none is
    left the youngest running sequence gives its room back and is computed again later.

    Args:
        slots: sequences that run at once.
        blocks: blocks of compressed entries.
        block_tokens: tokens a block covers.
        step_tokens: budget of one step.
    """

    def __init__(self, slots: int, blocks: int, block_tokens: int, step_tokens: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots, self.blocks = BlockPool(slots), BlockPool(blocks)
        self.block_tokens, self.step_tokens = block_tokens, step_tokens
        self.preemptions = 0
        self.drafts = 0  # guesses to verify for each sequence that has some

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this length could ever run alone."""
        return -(-tokens // self.block_tokens) <= self.blocks.size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it held."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> list[tuple[Sequence, Part]]:
        """Choose the next step's parts; empty when there is nothing to do.

        Calling it again without `advance` plans the same tokens (a step that was broken off).
        """
        budget = self.step_tokens
        planned: list[tuple[Sequence, Part]] = []
        by_need = sorted(self.running, key=lambda s: s.pending > 1)
        for sequence in by_need:
            budget -= self._plan_one(sequence, budget, planned)
        while self.waiting and self.slots.free and budget > 0:
            sequence = self.waiting[0]
            if -(-len(sequence.tokens) // self.block_tokens) > self.blocks.free:
                break
            self.waiting.popleft()
            sequence.slot = self.slots.take(1)[0]
            self.running.append(sequence)
            budget -= self._plan_one(sequence, budget, planned)
        return planned

    def advance(self, planned: list[tuple[Sequence, Part]]) -> None:
        """The planned parts have been computed and committed."""
        for sequence, part in planned:
            sequence.computed += len(part.ids) - part.drafts

    def _plan_one(
        self, sequence: Sequence, budget: int, planned: list[tuple[Sequence, Part]]
    ) -> int:
        count = min(sequence.pending, budget)
        if sequence not in self.running or count <= 0:
            return 0
        end = sequence.computed + count
        drafts = self._drafts(sequence, budget) if sequence.pending == 1 else []
        if not self._grow(sequence, end + len(drafts), planned):
            return 0
        whole = end == len(sequence.tokens)
        part = Part(
            sequence.slot,
            sequence.computed,
            (*sequence.tokens[sequence.computed : end], *drafts),
            tuple(sequence.blocks),
            (sequence.request.sampling, end) if whole else None,
            len(drafts),
        )
        planned.append((sequence, part))
        return len(part.ids)

    def _drafts(self, sequence: Sequence, budget: int) -> list[int]:
        """Guesses worth verifying: never one past the request's last token, and for free room."""
        remaining = sequence.request.max_tokens - sequence.generated
        count = min(self.drafts, remaining - 1, budget - 1)
        room = (self.blocks.free + len(sequence.blocks)) * self.block_tokens
        return sequence.drafts[: max(0, min(count, room - len(sequence.tokens)))]

    def _grow(self, sequence: Sequence, tokens: int, planned: list[tuple[Sequence, Part]]) -> bool:
        """Give a sequence blocks for `tokens`, from younger ones if need be."""
        wanted = -(-tokens // self.block_tokens) - len(sequence.blocks)
        while wanted > self.blocks.free:
            victim = self.running[-1]
            self._preempt(victim)
            planned[:] = [entry for entry in planned if entry[0] is not victim]
            if victim is sequence:
                return False
        if wanted > 0:
            sequence.blocks += self.blocks.take(wanted)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._release(victim)
        victim.computed = 0
        victim.drafts = []
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.give_back(sequence.blocks)
        if sequence.slot >= 0:
            self.slots.give_back([sequence.slot])
            sequence.slot = -1
