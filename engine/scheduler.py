"""Decide what the next step computes: decodes first, then prefill chunks, within a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from whalepod.engine.blocks import BlockPool
from whalepod.engine.prefix import PrefixCache
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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots, self.blocks = BlockPool(slots), BlockPool(blocks)
        self.block_tokens, self.step_tokens = block_tokens, step_tokens
        self.prefixes = PrefixCache(self.blocks, snapshots, block_tokens)
        self._reuse = len(snapshots) > 0
        self._reserved: list[int] = []
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
            self._record(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> list[tuple[Sequence, Part]]:
        """Choose the next step's parts; empty when there is nothing to do.

        Calling it again without `advance` plans the same tokens (a step that was broken off).
        """
        self.prefixes.give_back(self._reserved)
        for sequence in self.running:
            self._record(sequence)
        budget = self.step_tokens
        planned: list[tuple[Sequence, Part]] = []
        by_need = sorted(self.running, key=lambda s: s.pending > 1)
        for sequence in by_need:
            budget -= self._plan_one(sequence, budget, planned)
        while self.waiting and self.slots.free and budget > 0:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan_one(sequence, budget, planned)
        return planned

    def advance(
        self, planned: list[tuple[Sequence, Part]], right: Mapping[int, int] | None = None
    ) -> None:
        """The planned parts have been computed and committed.

        Args:
            right: how many of a slot's drafts were.
        """
        for sequence, part in planned:
            rows = len(part.ids) - part.drafts + (right or {}).get(part.slot, 0)
            for after, snapshot in part.keep:
                if after <= rows:
                    self._reserved.remove(snapshot)
                    sequence.kept.append((part.start + after, snapshot))
            sequence.computed += rows
            sequence.restore = -1

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
            sequence.restore,
            self._keep(sequence, end + len(drafts)),
            sequence.history() if whole else None,
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
        self.prefixes.evict(wanted - self.blocks.free)
        while wanted > self.blocks.free:
            victim = self.running[-1]
            self._preempt(victim)
            planned[:] = [entry for entry in planned if entry[0] is not victim]
            self.prefixes.evict(wanted - self.blocks.free)
            if victim is sequence:
                return False
        if wanted > 0:
            sequence.blocks += self.blocks.take(wanted)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._record(victim)
        self._release(victim)
        victim.computed = 0
        victim.drafts = []
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        own = sequence.blocks[len(sequence.nodes) :]
        self.blocks.give_back(own)
        sequence.blocks.clear()
        self.prefixes.release(sequence.nodes)
        sequence.restore = -1
        if sequence.slot >= 0:
            self.slots.give_back([sequence.slot])
            sequence.slot = -1

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and what is known of its prefix, if there is room."""
        path = self.prefixes.match(sequence.tokens, sequence.request.cache_salt)
        known = max((i + 1 for i, n in enumerate(path) if n.snapshot >= 0), default=0)
        self.prefixes.hold(path[:known])
        wanted = -(-len(sequence.tokens) // self.block_tokens) - known
        if wanted > self.blocks.free + self.prefixes.idle:
            self.prefixes.release(path[:known])
            return False
        sequence.slot = self.slots.take(1)[0]
        sequence.nodes = path[:known]
        sequence.blocks = [node.block for node in sequence.nodes]
        sequence.computed = known * self.block_tokens
        sequence.restore = path[known - 1].snapshot if known else -1
        sequence.branch = len(path) * self.block_tokens
        if not sequence.generated:
            sequence.cached = sequence.computed
            self.prefixes.asked_tokens += len(sequence.tokens)
            self.prefixes.hit_tokens += sequence.cached
        return True

    def _keep(self, sequence: Sequence, end: int) -> tuple[tuple[int, int], ...]:
        """Snapshots to take in a part that ends at `end`.

        One at its last block border, one where earlier sequences went on differently (others may
        do so again).
        """
        if not self._reuse:
            return ()
        start, size = sequence.computed, self.block_tokens
        pinned = {s.restore for s in self.running} | set(self._reserved)
        found = []
        for at in {end // size * size, sequence.branch}:
            if start < at <= end and (slot := self.prefixes.reserve(pinned)) >= 0:
                self._reserved.append(slot)
                found.append((at - start, slot))
        return tuple(sorted(found))

    def _record(self, sequence: Sequence) -> None:
        """Leave the blocks a sequence has completed, and its snapshots, for others."""
        if not self._reuse:
            return
        size, nodes = self.block_tokens, sequence.nodes
        complete = min(sequence.computed, len(sequence.tokens)) // size
        for i in range(len(nodes), complete):
            parent = nodes[-1] if nodes else self.prefixes.root(sequence.request.cache_salt)
            key = tuple(sequence.tokens[i * size : (i + 1) * size])
            nodes.append(self.prefixes.extend(parent, key, sequence.blocks[i]))
            sequence.blocks[i] = nodes[-1].block
        for tokens, snapshot in sequence.kept:
            if tokens <= len(nodes) * size:
                self.prefixes.attach(nodes[tokens // size - 1], snapshot)
            else:
                self.prefixes.give_back([snapshot])
        sequence.kept.clear()
