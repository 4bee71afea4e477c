"""What the controller knows of a member, and how it tells operators."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.topology import MemberInfo

Phase = Literal["rest", "prepare", "enter"]


@dataclass(frozen=True, slots=True)
class Order:
    """What a member is to do next. `seq` grows; only the latest order of a member counts."""

    seq: int
    phase: Phase
    epoch: dict[str, Any] | None = None


@dataclass(slots=True)
class Record:
    """A member as the controller knows it."""

    info: MemberInfo
    handle: Any
    order: Order = Order(0, "rest")
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    prepared: int = 0
    entered: int = 0
    leaving: bool = False


def report(epoch: Epoch | None, live: bool, members: Mapping[str, Record]) -> dict[str, Any]:
    """The epoch and its members as plain values.

    Args:
        live: whether the epoch has not been lost.
    """
    seats = {s.name: s for s in epoch.members} if epoch is not None else {}
    told = []
    for name, record in sorted(members.items()):
        held = seats.get(name)
        serving = live and epoch is not None and record.entered == epoch.id
        told.append(
            {
                "name": name,
                "pool": record.info.pool,
                "host": record.info.host,
                "state": "leaving" if record.leaving else "serving" if serving else "joining",
                "rank": held.rank if held else None,
                "roles": list(held.roles) if held else [],
                "experts": _count(epoch, name) if epoch and held else 0,
            }
        )
    return {
        "epoch": epoch.id if epoch else 0,
        "ready": live and all(name in members for name in seats),
        "fabric": epoch.backend if epoch else None,
        "placement_version": epoch.placement.version if epoch else 0,
        "members": told,
    }


def _count(epoch: Epoch, name: str) -> int:
    layers = range(len(epoch.placement.holders))
    return sum(len(epoch.placement.experts_of(name, layer)) for layer in layers)
