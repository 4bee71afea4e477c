"""Decide what the next step computes: who is admitted, who gives way, which rows each gets."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping

from whalepod.engine.fairness import divide, rank
from whalepod.engine.request import Sequence
from whalepod.engine.room import Room
from whalepod.engine.step import Part

_DISPLACED_AT_MOST = 3


class Scheduler:
    """Queues of one attention member.

    Requests are admitted in the order of `rank`: priority, then arrival. A sequence takes blocks as
    it grows; when none is left the last in that order gives its room back and is computed again
    later. The first in order never has to, so all come to an end. One that waits takes the room of
    those with less priority, but from each of them a few times at most.

    Args:
        slots: sequences that run at once.
        blocks: blocks of compressed entries.
        block_tokens: tokens a block covers.
        step_tokens: budget of one step.
        snapshots: slots beside those of sequences; with some, known prefixes are not computed again.
    """

    def __init__(
        self,
        slots: int,
        blocks: int,
        block_tokens: int,
        step_tokens: int,
        snapshots: range = range(0),
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.room = Room(slots, blocks, block_tokens, snapshots)
        self.slots, self.blocks = self.room.slots, self.room.blocks
        self.prefixes = self.room.prefixes
        self.block_tokens, self.step_tokens = block_tokens, step_tokens
        self._arrivals = self._steps = 0
        self._spare = 0  # free blocks that no known token will need
        self.preemptions = 0
        self.drafts = 0  # guesses to verify for each sequence that has some

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def admits(self) -> bool:
        """Whether the first that waits may be admitted now, if there are blocks for it."""
        if not self.waiting:
            return False
        first = self.waiting[0].request.priority
        return self.slots.free > 0 or any(s.request.priority > first for s in self.running)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this length could ever run alone."""
        return self.room.blocks_for(tokens) <= self.blocks.size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._arrivals += 1
        sequence.arrived = self._arrivals
        insort(self.waiting, sequence, key=rank)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it held."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.room.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> list[tuple[Sequence, Part]]:
        """Choose the next step's parts; empty when there is nothing to do.

        Calling it again without `advance` plans the same tokens (a step that was broken off).
        """
        planned = self._plan()
        while self.running and not planned:  # those whose turn it was have given way
            planned = self._plan()
        return planned

    def _plan(self) -> list[tuple[Sequence, Part]]:
        self.room.forget_reserved()
        for sequence in self.running:
            self.room.record(sequence)
        self._admit()
        running = sorted(self.running, key=rank)
        # Only drafts ask for it.
        self._spare = self.blocks.free - self.room.demand(running) if self.drafts else 0
        planned: list[tuple[Sequence, Part]] = []
        rows = divide(running, self.step_tokens, self._guesses)
        for sequence in running:
            # Whoever gives way to this one stands behind it, so it is not planned yet.
            if sequence in rows and sequence.slot >= 0:
                self._plan_one(sequence, rows[sequence], planned)
        return sorted(planned, key=lambda entry: entry[0].pending > 1)

    def advance(
        self, planned: list[tuple[Sequence, Part]], right: Mapping[int, int] | None = None
    ) -> None:
        """The planned parts have been computed and committed.

        Args:
            right: how many of a slot's drafts were, where any were.
        """
        self._steps += 1
        right = right or {}
        for sequence, part in planned:
            rows = len(part.ids) - part.drafts + right.get(part.slot, 0)
            for after, snapshot in part.keep:
                if after <= rows:
                    self.room.kept(sequence, part.start + after, snapshot)
            sequence.computed += rows
            sequence.restore, sequence.served, sequence.begun = -1, self._steps, True

    def _plan_one(
        self, sequence: Sequence, rows: int, planned: list[tuple[Sequence, Part]]
    ) -> None:
        self.room.look_again(sequence)
        request, start, known = sequence.request, sequence.computed, len(sequence.tokens)
        drafts = self._drafts(sequence, rows - 1) if known - start == 1 and rows > 1 else []
        end = min(known, start + rows)
        if not self._grow(sequence, end + len(drafts)):
            return
        draws = end == known and sequence.generated < request.max_tokens
        if (table := tuple(sequence.blocks)) != sequence.table:
            sequence.table = table
        part = Part(
            sequence.slot,
            start,
            (*sequence.tokens[start:end], *drafts),
            sequence.table,
            (request.sampling, end) if draws else None,
            len(drafts),
            sequence.restore,
            self.room.keep(sequence, start, end + len(drafts), self.running),
            sequence.history() if draws and request.sampling.adjust is not None else None,
            sequence.tell(end) if request.prompt_logprobs is not None else None,
        )
        planned.append((sequence, part))

    def _guesses(self, sequence: Sequence) -> int:
        """Guesses worth verifying: never one past the request's last token."""
        if not (self.drafts and sequence.drafts):
            return 0
        remaining = sequence.request.max_tokens - sequence.generated
        return max(0, min(self.drafts, remaining - 1, len(sequence.drafts)))

    def _drafts(self, sequence: Sequence, count: int) -> list[int]:
        """The first `count` guesses, as far as they fit where no known token has to go."""
        known = len(sequence.tokens)
        own = max(len(sequence.blocks), self.room.blocks_for(known))
        fitting = (own + max(0, self._spare)) * self.block_tokens - known
        drafts = sequence.drafts[: min(count, fitting)]
        self._spare -= max(0, self.room.blocks_for(known + len(drafts)) - own)
        return drafts

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence blocks for `tokens`, from those behind it if need be."""
        while not self.room.grow(sequence, tokens):
            victim = max(self.running, key=rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.room.release(victim)
        victim.computed = 0
        victim.drafts = []
        victim.tally.preempted += 1
        insort(self.waiting, victim, key=rank)
        self.preemptions += 1

    def _admit(self) -> None:
        """Admit who waits, in order, while there is room. Nobody is overtaken."""
        while self.admits:
            sequence = self.waiting[0]
            path, known = self.room.match(sequence)
            wanted = self.room.blocks_for(len(sequence.tokens)) - known
            self.prefixes.hold(path[:known])
            if not self._make_room(sequence, wanted):
                self.prefixes.release(path[:known])
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.room.enter(sequence, path, known)

    def _make_room(self, sequence: Sequence, wanted: int) -> bool:
        """Whether a slot and `wanted` blocks are to be had, from those of less priority if need be."""
        left, victims = self.room.left(self.running), list[Sequence]()
        for victim in sorted(self.running, key=rank, reverse=True):
            if self.slots.free + len(victims) > 0 and wanted <= left:
                break
            if victim.request.priority <= sequence.request.priority:
                return False
            if victim.displaced < _DISPLACED_AT_MOST:
                victims.append(victim)
                left += self.room.freed_by(victim)
        if not (self.slots.free + len(victims) > 0 and wanted <= left):
            return False
        for victim in victims:
            # Who has computed nothing loses nothing.
            victim.displaced += victim.computed > 0 and victim.restore < 0
            self._preempt(victim)
        return True
