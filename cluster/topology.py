"""From a configured topology and the members there are to seats in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from whalepod.cluster.epoch import Seat
from whalepod.config import Topology

Pool = Literal["attention", "experts", "router"]


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """A member that asks for a seat.

    `replica` groups the stages of one attention replica: they share it and differ in `stage`.
    """

    name: str
    pool: Pool
    stage: int = 0
    replica: str = ""
    host: str = "127.0.0.1"
    doorbell: int = 0


def seat(topology: Topology, members: Sequence[MemberInfo]) -> tuple[Seat, ...]:
    """Give members ranks and roles, in a stable order: attention by replica, routers, experts.

    Attention replicas that lack a stage get no seat. In layout `ep` every member is an attention
    member with all roles; `single` is `ep` with one.
    """
    attention = _whole_replicas(topology, members)
    routers = [m for m in members if m.pool == "router"]
    own = bool(routers) and topology.layout == "afd" and topology.router == "own"
    seats: list[Seat] = []
    for number, replica in enumerate(attention):
        for member in replica:
            roles: tuple[str, ...] = ("attention",)
            if not own:
                roles += ("router",)
            if topology.layout != "afd":
                roles += ("expert",)
            seats.append(_seat(member, len(seats), roles, number))
    for member in routers if own else []:
        seats.append(_seat(member, len(seats), ("router",)))
    if topology.layout == "afd":
        for member in (m for m in members if m.pool == "experts"):
            seats.append(_seat(member, len(seats), ("expert",)))
    return tuple(seats)


def wanted(topology: Topology) -> list[MemberInfo]:
    """The members of a configured topology, with made-up names (threads, planning)."""
    found = [
        MemberInfo(f"attention-{a}" + (f"-{s}" if s else ""), "attention", s, f"attention-{a}")
        for a in range(topology.attention)
        for s in range(topology.stages)
    ]
    if topology.layout == "afd":
        if topology.router == "own":
            found += [MemberInfo(f"router-{r}", "router") for r in range(topology.routers)]
        found += [MemberInfo(f"experts-{e}", "experts") for e in range(topology.experts)]
    return found


def seats_for(topology: Topology) -> tuple[Seat, ...]:
    """Seats of a configured topology, all members present."""
    return seat(topology, wanted(topology))


def lacking(topology: Topology, seats: Sequence[Seat], *, complete: bool) -> str:
    """What these seats lack to serve, as words; empty when they suffice.

    Args:
        complete: whether to ask for the configured numbers, not just for one of each.
    """
    attention = sum("attention" in s.roles for s in seats)
    experts = sum("expert" in s.roles for s in seats)
    if not attention:
        return "an attention member"
    if not experts:
        return "an expert member"
    if not complete:
        return ""
    pairs = [("attention", attention, topology.attention * topology.stages)]
    if topology.layout == "afd":
        pairs.append(("expert", experts, topology.experts))
        if topology.router == "own":
            routers = sum(s.roles == ("router",) for s in seats)
            pairs.append(("router", routers, topology.routers))
    for role, have, want in pairs:
        if have < want:
            return f"{want - have} more {role} member(s) of {want}"
    return ""


def _whole_replicas(topology: Topology, members: Sequence[MemberInfo]) -> list[list[MemberInfo]]:
    replicas: dict[str, list[MemberInfo]] = {}
    for member in members:
        if member.pool == "attention":
            replicas.setdefault(member.replica or member.name, []).append(member)
    ordered = (sorted(found, key=lambda m: m.stage) for found in replicas.values())
    return [r for r in ordered if [m.stage for m in r] == list(range(topology.stages))]


def _seat(member: MemberInfo, rank: int, roles: tuple[str, ...], replica: int = 0) -> Seat:
    return Seat(member.name, rank, roles, member.stage, replica, member.host, member.doorbell)
