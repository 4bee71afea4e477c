"""Who sends to whom within one epoch, and in which order; the same on every member."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from whalepod.cluster.epoch import Epoch
from whalepod.engine.legs import Place


@dataclass(frozen=True, slots=True)
class Announcement:
    """What one attention replica brings to a step: rows per micro-batch (or a wish to stop).

    `even` says that every row is one of another sequence that draws: sizes of messages follow. `wide` asks
    for messages from shards that have room for every output.
    """

    rows: tuple[int, int, int] = (0, 0, 0)
    stop: bool = False
    even: bool = False
    wide: bool = False


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous layers of each pipeline stage, as even as they can be."""
    bounds = [layers * s // stages for s in range(stages + 1)]
    return tuple(range(a, b) for a, b in pairwise(bounds))


@dataclass(frozen=True, slots=True)
class Lanes:
    """The routes of an epoch.

    Args:
        epoch: id of the epoch.
        stage_layers: layers of each pipeline stage.
        homes: attention ranks, `[stage][replica]`.
        routers: router ranks; empty when every attention member routes for itself.
        shards: expert ranks in placement order.
    """

    epoch: int
    stage_layers: tuple[range, ...]
    homes: tuple[tuple[int, ...], ...]
    routers: tuple[int, ...]
    shards: tuple[int, ...]

    @classmethod
    def of(cls, epoch: Epoch, num_layers: int) -> Lanes:
        """Read the lanes off an epoch."""
        stages = epoch.stages
        return cls(
            epoch.id,
            stage_layers(num_layers, stages),
            tuple(tuple(epoch.attention_ranks(s)) for s in range(stages)),
            tuple(epoch.router_ranks) if epoch.router == "own" else (),
            tuple(epoch.rank_of(name) for name in epoch.placement.shards),
        )

    @property
    def replicas(self) -> range:
        """Attention replicas."""
        return range(len(self.homes[0]))

    @property
    def lead(self) -> int:
        """The rank that starts every step."""
        return self.homes[0][0]

    def stage_of(self, layer: int) -> int:
        """Which stage holds a layer."""
        return next(s for s, layers in enumerate(self.stage_layers) if layer in layers)

    def dispatcher(self, layer: int, replica: int) -> int:
        """The rank that routes this replica's tokens in this layer."""
        if self.routers:
            return self.routers[replica % len(self.routers)]
        return self.homes[self.stage_of(layer)][replica]

    def passes(self, announced: dict[int, Announcement]) -> Iterator[tuple[Place, list[int]]]:
        """Every (layer, micro-batch) of a step in order, with the rows of each replica."""
        counts = [[announced[r].rows[m] for r in self.replicas] for m in range(3)]
        used = [m for m in range(3) if any(counts[m])]
        for layers in self.stage_layers:
            for layer in layers:
                for m in used:
                    yield Place(self.epoch, layer, m), counts[m]

    def load_of(self, layer: int, rows: list[int]) -> dict[int, int]:
        """Rows that each dispatcher has in this pass; dispatchers with none are left out."""
        loads: dict[int, int] = {}
        for replica, count in enumerate(rows):
            if count:
                rank = self.dispatcher(layer, replica)
                loads[rank] = loads.get(rank, 0) + count
        return loads
