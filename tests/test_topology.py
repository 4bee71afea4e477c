from __future__ import annotations

import pytest

from whalepod.cluster.topology import MemberInfo, Pool, seat, seats_for, wanted
from whalepod.config import Topology


def members(pool: Pool, *names: str) -> list[MemberInfo]:
    return [MemberInfo(name, pool, replica=name) for name in names]


def roles(topology: Topology, present: list[MemberInfo]) -> dict[str, tuple[str, ...]]:
    return {s.name: s.roles for s in seat(topology, present)}


AFD = Topology(layout="afd", attention=2, experts=2, router="own", routers=1)


def test_single_is_one_member_with_every_role() -> None:
    (only,) = seats_for(Topology(layout="single"))
    assert only.roles == ("attention", "router", "expert")
    assert (only.rank, only.stage, only.replica) == (0, 0, 0)


def test_ep_members_have_every_role_each_and_a_replica_of_their_own() -> None:
    seats = seats_for(Topology(layout="ep", attention=3))
    assert [s.roles for s in seats] == [("attention", "router", "expert")] * 3
    assert [s.replica for s in seats] == [0, 1, 2]


def test_ep_seats_neither_routers_nor_experts() -> None:
    present = members("experts", "e") + members("router", "r") + members("attention", "a")
    assert roles(Topology(layout="ep"), present) == {"a": ("attention", "router", "expert")}


def test_afd_seats_attention_then_routers_then_experts() -> None:
    seats = seats_for(AFD)
    assert [(s.name, s.roles) for s in seats] == [
        ("attention-0", ("attention",)),
        ("attention-1", ("attention",)),
        ("router-0", ("router",)),
        ("experts-0", ("expert",)),
        ("experts-1", ("expert",)),
    ]


def test_ranks_number_the_seats_whatever_the_order_of_joining() -> None:
    present = members("experts", "e1") + members("router", "r") + members("attention", "a", "b")
    present += members("experts", "e0")
    seats = seat(AFD, present)
    assert [s.rank for s in seats] == list(range(5))
    assert [s.name for s in seats] == ["a", "b", "r", "e1", "e0"]


def test_router_in_attention_needs_no_router_member() -> None:
    topology = Topology(attention=2, experts=1, router="attention")
    assert [s.roles for s in seats_for(topology)] == [
        ("attention", "router"),
        ("attention", "router"),
        ("expert",),
    ]


def test_router_members_get_no_seat_when_attention_routes() -> None:
    topology = Topology(router="attention")
    present = members("attention", "a") + members("router", "r") + members("experts", "e")
    assert roles(topology, present) == {"a": ("attention", "router"), "e": ("expert",)}


def test_when_all_routers_are_gone_attention_routes() -> None:
    present = members("attention", "a", "b") + members("experts", "e")
    with_router = present + members("router", "r")
    assert roles(AFD, with_router)["a"] == ("attention",)
    assert roles(AFD, present) == {
        "a": ("attention", "router"),
        "b": ("attention", "router"),
        "e": ("expert",),
    }


STAGED = Topology(attention=2, stages=3, experts=1, router="attention")


def test_stages_of_a_replica_stand_together_in_order() -> None:
    found = [(s.name, s.replica, s.stage) for s in seats_for(STAGED)[:-1]]
    assert found == [
        ("attention-0", 0, 0),
        ("attention-0-1", 0, 1),
        ("attention-0-2", 0, 2),
        ("attention-1", 1, 0),
        ("attention-1-1", 1, 1),
        ("attention-1-2", 1, 2),
    ]


def test_stages_may_join_in_any_order() -> None:
    last_first = sorted(wanted(STAGED), key=lambda m: -m.stage)
    assert [(s.replica, s.stage) for s in seat(STAGED, last_first)[:-1]] == [
        (replica, stage) for replica in range(2) for stage in range(3)
    ]


@pytest.mark.parametrize("lacking", ["attention-0", "attention-0-1", "attention-0-2"])
def test_a_replica_that_lacks_a_stage_gets_no_seat(lacking: str) -> None:
    seats = seat(STAGED, [m for m in wanted(STAGED) if m.name != lacking])
    assert [s.name for s in seats] == [
        "attention-1", "attention-1-1", "attention-1-2", "experts-0",
    ]  # fmt: skip
    assert [s.rank for s in seats] == [0, 1, 2, 3]
    assert {s.replica for s in seats} == {0}


def test_a_stage_twice_makes_no_replica() -> None:
    twice = [MemberInfo(n, "attention", 0, "a") for n in ("x", "y")]
    assert seat(Topology(router="attention"), twice) == ()


def test_addresses_pass_through() -> None:
    info = MemberInfo("a", "attention", host="10.0.0.7", doorbell=4711)
    (only,) = seat(Topology(layout="single"), [info])
    assert (only.host, only.doorbell) == ("10.0.0.7", 4711)


def test_nobody_gets_no_seats() -> None:
    assert seat(AFD, []) == ()


def test_wanted_counts_what_the_topology_says() -> None:
    topology = Topology(attention=2, stages=2, experts=3, router="own", routers=2)
    pools = [m.pool for m in wanted(topology)]
    assert [pools.count(p) for p in ("attention", "router", "experts")] == [4, 2, 3]
    assert len({m.name for m in wanted(topology)}) == 9
