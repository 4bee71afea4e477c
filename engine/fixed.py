"""Legs of fixed sizes: steps in which every row decodes go through all layers without a word to the host.

The step header says how many rows each home brings; from it every member knows the size of each message,
so nothing is counted, no size travels, and a whole step can be captured in a graph. Every row goes to every
shard, with the ids of its experts there; every (row, choice) comes home from every shard, and home
takes the one from the shard that held it. A message ends with the seal that its home gave the step's last
pass: it comes back only if every member on the way did its part in this very step.

Legend: S shards, C rows of a home, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric, Work
from whalepod.engine.expert import ExpertShard
from whalepod.engine.graph import rows_of
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import LANE_OF
from whalepod.engine.router import Router
from whalepod.errors import EpochLost
from whalepod.model.shape import ModelConfig

SEAL_BYTES = 16
# Rows of every replica, by micro-batch.
Sizes = tuple[tuple[int, ...], ...]


def fixed_sizes(announced: dict[int, Announcement]) -> Sizes | None:
    """Rows of a step of fixed sizes, or None when some replica brings other than decoding rows."""
    if not all(a.even for a in announced.values() if any(a.rows)):
        return None
    counts = [[announced[r].rows[m] for r in sorted(announced)] for m in range(3)]
    made = tuple(tuple(rows_of(n) or 0 if n else 0 for n in rows) for rows in counts if any(rows))
    return made or None


@dataclass(slots=True)
class FixedForm:
    """Bytes of messages."""

    width: int
    dtype: torch.dtype
    k: int

    def to_router(self, rows: int) -> int:
        """Rows, token ids, seal."""
        return rows * (self.width * self.dtype.itemsize + 4) + SEAL_BYTES

    def to_shard(self, rows: int) -> int:
        """Rows, expert ids (-1: not at this shard), weights, seal."""
        return rows * (self.width * self.dtype.itemsize + 8 * self.k) + SEAL_BYTES

    def to_home(self, rows: int) -> int:
        """A row for each choice, expert ids, seal."""
        return rows * self.k * (self.width * self.dtype.itemsize + 4) + SEAL_BYTES

    def split(self, message: Tensor, rows: int, *ints: int) -> list[Tensor]:
        """Views of a message's parts, `[..., bytes]`.

        Args:
            rows: how many rows of `width`. ints: columns of int32 after them.

        Returns:
            rows `[..., rows, D]`, each `[..., rows, columns]` int32, and the seal `[..., 4]` int32.
        """
        size = rows * self.width * self.dtype.itemsize
        parts = [message[..., :size].view(self.dtype).unflatten(-1, (rows, self.width))]
        for columns in ints:
            end = size + 4 * rows * columns
            parts.append(message[..., size:end].view(torch.int32).unflatten(-1, (rows, columns)))
            size = end
        return [*parts, message[..., size : size + SEAL_BYTES].view(torch.int32)]


@dataclass(slots=True)
class FixedLegs:
    """One member's seat in an epoch, for steps of fixed sizes; outlives their graphs.

    Args:
        replica: of an attention member. router, shard: what this member carries besides, or alone.
    """

    config: ModelConfig
    fabric: Fabric
    lanes: Lanes
    dtype: torch.dtype
    device: torch.device
    replica: int | None = None
    router: Router | None = None
    shard: ExpertShard | None = None
    form: FixedForm = field(init=False)
    shard_S: Tensor = field(init=False)
    seal: Tensor = field(init=False)
    fault: Tensor = field(init=False)
    nothing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Put what graphs read and write where it stays."""
        self.form = FixedForm(self.config.hidden_size, self.dtype, self.config.num_experts_per_tok)
        number = {rank: i for i, rank in enumerate(self.lanes.shards)}
        # Messages lie in the order of ranks, tables hold the numbers of shards.
        order = [number[rank] for rank in sorted(number)]
        self.shard_S = torch.tensor(order, device=self.device)
        self.seal = torch.zeros(4, dtype=torch.int32, device=self.device)
        self.nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.fault = torch.zeros((), dtype=torch.bool, device=self.device)

    @property
    def places(self) -> tuple[int, ...]:
        """Changes when a graph may no longer be replayed: another epoch, or weights have moved."""
        held = self.shard.experts.values() if self.shard is not None else ()
        moves = [n for t in held for n in (id(t), getattr(t, "moves", 0))]
        return (id(self.fabric), self.lanes.epoch, *moves)

    def key(self, sizes: Sizes) -> Sizes:
        """What a graph of this member depends on besides its own inputs."""
        alone = self.shard is None and self.replica is not None
        return tuple((rows[self.replica],) for rows in sizes) if alone else sizes  # type: ignore[index]

    def begin(self, step: int) -> None:
        """Give a step its seal."""
        self.seal.copy_(torch.tensor([self.lanes.epoch, step, ~step, 1], dtype=torch.int32))
        self.fault.zero_()

    def check(self) -> None:
        """Raise EpochLost unless the seal came back whole; what it covers is on the host by then."""
        broken = bool(self.fault.item())
        self.fabric.check()
        if broken:
            raise EpochLost(self.lanes.epoch, [], "a step came back without its seal")

    def blocks(self, dispatcher: int, rows: Seq[int]) -> list[int]:
        """Rows of each home that a rank dispatches for, in the order of replicas."""
        return [
            count
            for replica, count in enumerate(rows)
            if count and self.lanes.dispatcher(0, replica) == dispatcher
        ]

    def dispatchers(self, rows: Seq[int]) -> list[int]:
        """Ranks that dispatch in a pass, ascending."""
        return sorted({self.lanes.dispatcher(0, r) for r, count in enumerate(rows) if count})

    def arrivals(self, rows: Seq[int]) -> list[tuple[int, int]]:
        """(home's rank, rows) in the order in which they come to a shard."""
        homes = self.lanes.homes[0]
        found = [(self.lanes.dispatcher(0, r), r, n) for r, n in enumerate(rows) if n]
        return [(homes[r], n) for _, r, n in sorted(found)]

    def start(self, tag: int, come: dict[int, int], data: Tensor, go: dict[int, int]) -> Leg:
        """Let a leg go; bytes by rank."""
        ranks = range(self.fabric.size)
        out = torch.empty(sum(come.values()), dtype=torch.uint8, device=self.device)
        sizes = [come.get(r, 0) for r in ranks], [go.get(r, 0) for r in ranks]
        return Leg(self.fabric.all_to_all(LANE_OF[tag], out, data, *sizes), out)


@dataclass(slots=True)
class Leg:
    """One under way."""

    work: Work
    out: Tensor

    def take(self) -> Tensor:
        """What has come; for a leg in which nothing comes, nothing."""
        self.work.wait()
        return self.out
