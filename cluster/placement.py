"""Which shard holds which expert: immutable, versioned, movable in small steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NewType

from whalepod.errors import ConfigError

ExpertId = NewType("ExpertId", int)
ShardIndex = NewType("ShardIndex", int)


@dataclass(frozen=True)
class Placement:
    """Experts of every layer on shards, with replicas allowed.

    Args:
        shards: member names; a shard's index is its place here.
        holders: `[layer][expert]` -> indices of the shards that hold it, at least one.
        version: grows with every change.
    """

    shards: tuple[str, ...]
    holders: tuple[tuple[tuple[ShardIndex, ...], ...], ...]
    version: int = 1

    def __post_init__(self) -> None:
        """Refuse a placement that leaves an expert nowhere or names an unknown shard."""
        for layer, experts in enumerate(self.holders):
            for expert, at in enumerate(experts):
                if not at or len(set(at)) != len(at):
                    raise ConfigError(
                        f"layer {layer} expert {expert} is placed on shards {list(at)}; "
                        "every expert needs at least one shard, each at most once"
                    )
                if max(at) >= len(self.shards) or min(at) < 0:
                    raise ConfigError(
                        f"layer {layer} expert {expert} is placed on shard {max(at)}, "
                        f"but there are {len(self.shards)} shards"
                    )

    @classmethod
    def balanced(
        cls, layers: int, experts: int, shards: Sequence[str], replicas: int = 0
    ) -> Placement:
        """Spread contiguous runs of experts evenly; sizes differ by at most one.

        Args:
            replicas: further copies of every expert, each on the shards that follow.

        Raises:
            ConfigError: no shards, or more copies than shards.
        """
        if not shards or replicas + 1 > len(shards):
            raise ConfigError(
                f"{replicas + 1} copies of each expert need as many shards; there are {len(shards)}"
            )
        count = len(shards)
        table = tuple(
            tuple(
                ShardIndex((expert * count // experts + copy) % count)
                for copy in range(replicas + 1)
            )
            for expert in range(experts)
        )
        return cls(tuple(shards), (table,) * layers)

    def moved_to(self, shards: Sequence[str]) -> Placement:
        """Place the same experts on another set of shards, moving as few as balance allows.

        A layer's experts that stay on a surviving shard stay; those of lost shards and the excess
        of overfull ones go to the emptiest.
        """
        index = {name: i for i, name in enumerate(shards)}
        table = tuple(_rebalance(layer, self.shards, index, len(shards)) for layer in self.holders)
        return Placement(tuple(shards), table, self.version + 1)

    def shards_of(self, layer: int, expert: int) -> tuple[ShardIndex, ...]:
        """Indices of the shards that hold an expert."""
        return self.holders[layer][expert]

    def experts_of(self, shard: str, layer: int) -> tuple[ExpertId, ...]:
        """Experts of a layer that a shard holds."""
        return self._by_shard.get(shard, {}).get(layer, ())

    def missing(self, alive: Collection[str]) -> list[tuple[int, ExpertId]]:
        """(layer, expert) pairs that no living shard holds."""
        return [
            (layer, ExpertId(expert))
            for layer, experts in enumerate(self.holders)
            for expert, at in enumerate(experts)
            if not any(self.shards[s] in alive for s in at)
        ]

    @cached_property
    def _by_shard(self) -> dict[str, dict[int, tuple[ExpertId, ...]]]:
        found: dict[str, dict[int, tuple[ExpertId, ...]]] = {name: {} for name in self.shards}
        for layer, experts in enumerate(self.holders):
            for expert, at in enumerate(experts):
                for shard in at:
                    held = found[self.shards[shard]]
                    held[layer] = (*held.get(layer, ()), ExpertId(expert))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Layers that are alike are stored once."""
        unique = list(dict.fromkeys(self.holders))
        return {
            "shards": list(self.shards),
            "version": self.version,
            "tables": [[list(at) for at in table] for table in unique],
            "layers": [unique.index(table) for table in self.holders],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Placement:
        """Inverse of `to_dict`."""
        tables = [
            tuple(tuple(ShardIndex(s) for s in at) for at in table) for table in data["tables"]
        ]
        return cls(tuple(data["shards"]), tuple(tables[i] for i in data["layers"]), data["version"])


def _rebalance(
    layer: tuple[tuple[ShardIndex, ...], ...],
    old: tuple[str, ...],
    index: dict[str, int],
    count: int,
) -> tuple[tuple[ShardIndex, ...], ...]:
    copies = min(max(len(at) for at in layer), count)
    total = copies * len(layer)
    room = [total // count + (s < total % count) for s in range(count)]
    kept = [[index[old[s]] for s in at if old[s] in index][:copies] for at in layer]
    load = [sum(s in at for at in kept) for s in range(count)]
    # Which shards get the larger share is open: let those have it that are fullest already.
    for s, size in zip(sorted(range(count), key=lambda s: -load[s]), list(room), strict=True):
        room[s] = size
    for at in reversed(kept):
        for s in list(at):
            if load[s] > room[s]:
                at.remove(s)
                load[s] -= 1
    for at in kept:
        while len(at) < copies:
            free = [s for s in range(count) if s not in at]
            best = max(free, key=lambda s: (room[s] - load[s], -s))
            at.append(best)
            load[best] += 1
    # With several copies the emptiest shard may hold the last experts already: pass others on.
    while max(load) - min(load) > 1:
        full, empty = load.index(max(load)), load.index(min(load))
        at = next(at for at in kept if full in at and empty not in at)
        at[at.index(full)] = empty
        load[full] -= 1
        load[empty] += 1
    return tuple(tuple(ShardIndex(s) for s in at) for at in kept)
