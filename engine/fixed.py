"""Legs of fixed sizes: steps in which every row decodes go through all layers without a word to the host.

The step header says how many rows each home brings; from it every member knows the size of each message,
so nothing is counted, no size travels, and a whole step can be captured in a graph. Every row goes to every
shard, with the ids of its experts there. From each shard come the outputs of those, as many as there is room
for, and where each choice's stands: there is room for twice a shard's even share. When that was not enough
the step is void, and a home that has met such a step asks for room for all for a while. A message ends with
the seal that its home gave the step: it comes back only if every member on the way did its part in it.

Legend: S shards, C rows of a home, K experts per token, D width, M rows at a shard.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric, Work
from whalepod.engine.expert import ExpertShard
from whalepod.engine.fixed_form import FixedForm, where
from whalepod.engine.graph import rows_of
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import LANE_OF
from whalepod.engine.router import Router
from whalepod.errors import EpochLost
from whalepod.kernels.hand_back import COLUMNS
from whalepod.model.shape import ModelConfig


class Crowded(Exception):
    """A shard had no room for all outputs of a step; nothing of it has become visible."""


class Sizes(NamedTuple):
    """Rows of every replica, by micro-batch; whether there is room for all outputs at each shard."""

    rows: tuple[tuple[int, ...], ...]
    wide: bool = False


def fixed_sizes(announced: dict[int, Announcement]) -> Sizes | None:
    """Rows of a step of fixed sizes, or None when some replica brings other than decoding rows."""
    some = [a for a in announced.values() if any(a.rows)]
    if not some or not all(a.even for a in some):
        return None
    counts = [[announced[r].rows[m] for r in sorted(announced)] for m in range(3)]
    made = tuple(tuple(rows_of(n) or 0 if n else 0 for n in rows) for rows in counts if any(rows))
    return Sizes(made, any(a.wide for a in some))


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
    faults: Tensor = field(init=False)
    nothing: Tensor = field(init=False)
    _tables: dict[tuple[tuple[int, ...], bool], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Put what graphs read and write where it stays."""
        width, k = self.config.hidden_size, self.config.num_experts_per_tok
        self.form = FixedForm(width, self.dtype, k, len(self.lanes.shards))
        number = {rank: i for i, rank in enumerate(self.lanes.shards)}
        # Messages lie in the order of ranks, tables hold the numbers of shards.
        order = [number[rank] for rank in sorted(number)]
        self.shard_S = torch.tensor(order, device=self.device)
        self.seal = torch.zeros(4, dtype=torch.int32, device=self.device)
        self.nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
        # Whether the seal is missing, and whether some shard was crowded.
        self.faults = torch.zeros(2, dtype=torch.int32, device=self.device)

    @property
    def places(self) -> tuple[int, ...]:
        """Changes when a graph may no longer be replayed: another epoch, or weights have moved."""
        held = self.shard.experts.values() if self.shard is not None else ()
        moves = [n for t in held for n in (id(t), getattr(t, "moves", 0))]
        return (id(self.fabric), self.lanes.epoch, *moves)

    def key(self, sizes: Sizes) -> Sizes:
        """What a graph of this member depends on besides its own inputs."""
        if self.shard is not None or self.replica is None:
            return sizes
        return Sizes(tuple((rows[self.replica],) for rows in sizes.rows), sizes.wide)

    def begin(self, step: int) -> None:
        """Give a step its seal."""
        self.seal.copy_(torch.tensor([self.lanes.epoch, step, ~step, 1], dtype=torch.int32))
        self.faults.zero_()

    def check(self) -> None:
        """Raise unless the step is whole; what it covers is on the host by then.

        Raises:
            EpochLost: the seal did not come back.
            Crowded: it did, but not all outputs.
        """
        broken, crowded = self.faults.tolist()
        self.fabric.check()
        if broken:
            raise EpochLost(self.lanes.epoch, [], "a step came back without its seal")
        if crowded:
            raise Crowded

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

    def table(self, rows: Seq[int], wide: bool) -> Tensor:
        """Where the rows of a pass lie at this shard, for `hand_back.py`; made when first asked for."""
        found = self._tables.get((tuple(rows), wide))
        if found is None:
            lines = where(self.form, self.arrivals(rows), wide)
            found = torch.tensor(lines, dtype=torch.int64).view(-1, COLUMNS).to(self.device)
            self._tables[tuple(rows), wide] = found
        return found

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
