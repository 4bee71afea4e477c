"""The room that sequences share: slots of the rings, blocks of entries, and known prefixes in them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from whalepod.engine.blocks import BlockPool
from whalepod.engine.prefix import Node, PrefixCache
from whalepod.engine.request import Sequence


class Room:
    """Who holds what. A sequence holds a slot and blocks; the first of these may be known prefixes.

    Args:
        slots: sequences that run at once.
        blocks: blocks of compressed entries.
        block_tokens: tokens a block covers.
        snapshots: slots beside those of sequences; with some, known prefixes are not computed again.
    """

    def __init__(self, slots: int, blocks: int, block_tokens: int, snapshots: range) -> None:
        self.slots, self.blocks = BlockPool(slots), BlockPool(blocks)
        self.block_tokens = block_tokens
        self.prefixes = PrefixCache(self.blocks, snapshots, block_tokens)
        self._reuse = len(snapshots) > 0
        self._reserved: list[int] = []

    def prompts(self, copies: int) -> int:
        """How often the prompt of so many requests that come after one another is computed."""
        return 1 if self._reuse else copies

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.block_tokens)

    def demand(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that these still need for the tokens they have."""
        return sum(max(0, self.blocks_for(len(s.tokens)) - len(s.blocks)) for s in sequences)

    def left(self, running: Seq[Sequence]) -> int:
        """Blocks that can be had without taking what running sequences hold or still need."""
        return self.blocks.free + self.prefixes.idle - self.demand(running)

    def freed_by(self, sequence: Sequence) -> int:
        """How many more would be `left` without this sequence."""
        alone = sum(node.refs == 1 for node in sequence.nodes)
        own = len(sequence.blocks) - len(sequence.nodes)
        return alone + own + self.demand([sequence])

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence blocks for `tokens` if they are free or held by nobody."""
        wanted = self.blocks_for(tokens) - len(sequence.blocks)
        if wanted <= 0:
            return True
        self.prefixes.evict(wanted - self.blocks.free)
        if wanted > self.blocks.free:
            return False
        sequence.blocks += self.blocks.take(wanted)
        return True

    def match(self, sequence: Sequence) -> tuple[list[Node], int]:
        """What is known of a sequence's prefix, and how many blocks of it it can go on from."""
        path = self.prefixes.match(sequence.tokens, sequence.request.cache_salt)
        most = sequence.skippable // self.block_tokens
        usable = (i + 1 for i, n in enumerate(path[:most]) if n.snapshot >= 0)
        return path, max(usable, default=0)

    def enter(self, sequence: Sequence, path: list[Node], known: int) -> None:
        """Give a sequence a slot; it holds the first `known` blocks of `path` already."""
        sequence.slot = self.slots.take(1)[0]
        if _is_new(sequence):
            self.prefixes.asked_tokens += len(sequence.tokens)
        self._go_on(sequence, path, known)

    def look_again(self, sequence: Sequence) -> None:
        """Before its first rows: others may have left more of its prefix since it was admitted."""
        if sequence.computed and sequence.restore < 0:
            return
        path, known = self.match(sequence)
        if known * self.block_tokens > sequence.computed:
            self.prefixes.hold(path[:known])
            self.blocks.give_back(sequence.blocks[len(sequence.nodes) :])
            self.prefixes.release(sequence.nodes)
            self._go_on(sequence, path, known)

    def _go_on(self, sequence: Sequence, path: list[Node], known: int) -> None:
        before = sequence.computed
        sequence.nodes = path[:known]
        sequence.blocks = [node.block for node in sequence.nodes]
        sequence.computed = known * self.block_tokens
        sequence.restore = path[known - 1].snapshot if known else -1
        sequence.branch = len(path) * self.block_tokens
        if _is_new(sequence):
            sequence.cached = sequence.computed
            self.prefixes.hit_tokens += sequence.computed - before

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds, after leaving what others may use."""
        self.record(sequence)
        own = sequence.blocks[len(sequence.nodes) :]
        self.blocks.give_back(own)
        sequence.blocks.clear()
        self.prefixes.release(sequence.nodes)
        sequence.restore = -1
        if sequence.slot >= 0:
            self.slots.give_back([sequence.slot])
            sequence.slot = -1

    def forget_reserved(self) -> None:
        """The step that snapshots were reserved for is over, or was never run."""
        self.prefixes.give_back(self._reserved)

    def keep(
        self, sequence: Sequence, start: int, end: int, running: Seq[Sequence]
    ) -> tuple[tuple[int, int], ...]:
        """Snapshots to take in a part from `start` to `end`.

        One at its last block border, one where earlier sequences went on differently (others may
        do so again).
        """
        if not self._reuse:
            return ()
        size = self.block_tokens
        borders = {at for at in (end // size * size, sequence.branch) if start < at <= end}
        if not borders:
            return ()
        pinned = {s.restore for s in running} | set(self._reserved)
        found = []
        for at in borders:
            if (slot := self.prefixes.reserve(pinned)) >= 0:
                self._reserved.append(slot)
                found.append((at - start, slot))
        return tuple(sorted(found))

    def kept(self, sequence: Sequence, tokens: int, snapshot: int) -> None:
        """A snapshot was taken, after so many of a sequence's tokens."""
        self._reserved.remove(snapshot)
        sequence.kept.append((tokens, snapshot))

    def record(self, sequence: Sequence) -> None:
        """Leave the blocks a sequence has completed, and its snapshots, for others."""
        if not self._reuse:
            return
        size, nodes = self.block_tokens, sequence.nodes
        complete = min(sequence.computed, len(sequence.tokens)) // size
        if complete <= len(nodes) and not sequence.kept:
            return
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


def _is_new(sequence: Sequence) -> bool:
    """Whether what is known of it was left by others, not by itself before it was preempted."""
    return not sequence.begun and not sequence.generated
