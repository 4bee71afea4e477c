"""Reuse of computed prefixes: a radix tree over blocks of tokens, and snapshots of the rings.

A block's compressed entries serve every sequence that starts with the same tokens. To go on after
a prefix a sequence also needs the rings as they were there (raw window keys, open compressor rows),
so a hit ends at a block that has a snapshot; what follows is computed again, to the same bits.

Snapshots are spare slots of the rings. Trees of different salts share nothing.

Room is made by cost (GreedyDual): what would take the fewest tokens to compute again goes first,
and everything ages as others go, so that what is never used again goes too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from whalepod.engine.blocks import BlockPool


@dataclass(slots=True, eq=False)
class Node:
    """One block of tokens after its parent's. `refs` counts the running sequences that hold it.

    `cost` is how many tokens lie between its snapshot and the one before, 0 without a snapshot;
    `worth` is the cost above what the cheapest had when this was last used.
    """

    parent: Node | None
    key: tuple[int, ...]
    block: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    refs: int = 0
    used: int = 0
    snapshot: int = -1
    cost: int = 0
    worth: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """What goes first is lowest; among equals the least recently used."""
        return self.worth, self.used


class PrefixCache:
    """What finished and running sequences leave for others. The engine loop owns it.

    Args:
        blocks: the pool that sequences take blocks from; cached blocks count as taken.
        snapshots: slots that snapshots may use.
        block_tokens: tokens of a block.
    """

    def __init__(self, blocks: BlockPool, snapshots: Seq[int], block_tokens: int) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self.hit_tokens = self.asked_tokens = 0
        self._free = list(snapshots)
        self._roots: dict[str, Node] = {}
        self._salts: dict[Node, str] = {}
        self._nodes: set[Node] = set()
        self._idle = 0
        self._clock = self._level = 0

    @property
    def idle(self) -> int:
        """Cached blocks that no running sequence holds; they can be had back."""
        return self._idle

    def root(self, salt: str) -> Node:
        """The empty prefix of one salt."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, (), -1)
            self._salts[root] = salt
        return root

    def match(self, tokens: Seq[int], salt: str) -> list[Node]:
        """Blocks in the tree that `tokens` starts with; at least one token stays uncovered."""
        found: list[Node] = []
        node = self._roots.get(salt)
        if node is None:
            return found
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            child = node.children.get(tuple(tokens[start : start + self.block_tokens]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def hold(self, nodes: Seq[Node]) -> None:
        """A running sequence uses these blocks."""
        self._clock += 1
        for node in nodes:
            self._idle -= node.refs == 0
            node.refs += 1
            node.used, node.worth = self._clock, self._level + node.cost

    def release(self, nodes: list[Node]) -> None:
        """It no longer does; empties the list."""
        for node in nodes:
            node.refs -= 1
            self._idle += node.refs == 0
        nodes.clear()

    def extend(self, parent: Node, key: tuple[int, ...], block: int) -> Node:
        """The child of `parent` with these tokens, held; made with `block` if there was none.

        A block that is not needed, because the child has one, goes back to the pool.
        """
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = Node(parent, key, block)
            self._nodes.add(child)
            self._idle += 1
        elif child.block != block:
            self.blocks.give_back([block])
        self.hold([child])
        return child

    def attach(self, node: Node, snapshot: int) -> None:
        """Give a block the snapshot that was taken at its end."""
        if node.snapshot >= 0:
            self._free.append(snapshot)
        else:
            node.snapshot = snapshot
            node.cost = self._cost(node)
            node.worth = self._level + node.cost

    def reserve(self, pinned: Collection[int]) -> int:
        """A slot for a snapshot, from the cheapest to do without if need be; -1: none.

        Args:
            pinned: snapshots that a coming step still reads.
        """
        if not self._free:
            owners = [n for n in self._nodes if n.snapshot >= 0 and n.snapshot not in pinned]
            if not owners:
                return -1
            cheapest = min(owners, key=lambda n: n.rank)
            self._level = max(self._level, cheapest.worth)
            self._free.append(cheapest.snapshot)
            cheapest.snapshot, cheapest.cost = -1, 0
        return self._free.pop()

    def forget(self, salt: str) -> None:
        """Let nobody find what sequences of one salt have left: it is wrong."""
        root = self._roots.pop(salt, None)
        if root is not None:
            del self._salts[root]

    def give_back(self, snapshots: list[int]) -> None:
        """Reserved slots that were not used; empties the list."""
        self._free += snapshots
        snapshots.clear()

    def evict(self, count: int) -> None:
        """Free up to `count` idle blocks, the cheapest ends of the tree first.

        An end without a snapshot is of no use to anybody, so it goes before all others.
        """
        while count > 0:
            ends = sorted(self._ends(), key=lambda n: n.rank)
            if not ends:
                return
            # Ends with a snapshot go one at a time: what is above one may be without.
            ends = [n for n in ends if n.snapshot < 0][:count] or ends[:1]
            for node in ends:
                self._level = max(self._level, node.worth if node.snapshot >= 0 else 0)
                self._remove(node)
            count -= len(ends)

    def _cost(self, node: Node) -> int:
        """Tokens from the snapshot before this block's end to there."""
        blocks, above = 1, node.parent
        while above is not None and above.parent is not None and above.snapshot < 0:
            blocks, above = blocks + 1, above.parent
        return blocks * self.block_tokens

    def _ends(self) -> Iterator[Node]:
        return (n for n in self._nodes if not n.refs and not n.children)

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self._nodes.remove(node)
        self._idle -= 1
        self.blocks.give_back([node.block])
        if node.snapshot >= 0:
            self._free.append(node.snapshot)
        if node.parent in self._salts and not node.parent.children:
            # Salts come without end; what they leave must not.
            del self._roots[self._salts.pop(node.parent)]
