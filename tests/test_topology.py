from typing import Any

import pytest

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.placement import Placement
from whalepod.cluster.topology import MemberInfo, lacking, seat, seats_for, wanted
from whalepod.config import Topology
from whalepod.errors import ConfigError


def roles(**topology: Any) -> list[tuple[str, ...]]:
    return [s.roles for s in seats_for(Topology(**topology))]


def test_layouts() -> None:
    everything = ("attention", "router", "expert")
    assert roles(layout="single") == [everything]
    assert roles(layout="ep", attention=3) == [everything] * 3
    assert roles(attention=1, experts=2) == [("attention",), ("router",), ("expert",), ("expert",)]
    assert roles(router="attention", experts=1) == [("attention", "router"), ("expert",)]


def test_without_routers_the_router_sits_in_attention() -> None:
    topology = Topology(attention=1, experts=1, router="own")
    left = [m for m in wanted(topology) if m.pool != "router"]
    assert [s.roles for s in seat(topology, left)] == [("attention", "router"), ("expert",)]


def test_a_replica_without_all_its_stages_has_no_seat() -> None:
    topology = Topology(attention=2, stages=2, experts=1, router="attention")
    members = [m for m in wanted(topology) if m.name != "attention-1-1"]
    seats = seat(topology, members)
    assert [(s.name, s.stage, s.replica) for s in seats if "attention" in s.roles] == [
        ("attention-0", 0, 0),
        ("attention-0-1", 1, 0),
    ]
    assert [s.rank for s in seats] == list(range(len(seats)))


def test_what_is_lacking() -> None:
    topology = Topology(attention=2, experts=3, routers=1)
    full = wanted(topology)

    def told(keep: set[str], complete: bool) -> str:
        return lacking(
            topology, seat(topology, [m for m in full if m.name in keep]), complete=complete
        )

    assert told({"experts-0"}, False) == "an attention member"
    assert told({"attention-0"}, False) == "an expert member"
    some = {"attention-0", "experts-0"}
    assert told(some, False) == ""
    assert told(some, True) == "1 more attention member(s) of 2"
    assert told({m.name for m in full}, True) == ""


def test_epochs_survive_json_and_refuse_other_configurations() -> None:
    topology = Topology(attention=2, stages=2, experts=2)
    seats = seats_for(topology)
    shards = [s.name for s in seats if "expert" in s.roles]
    epoch = Epoch(3, seats, Placement.balanced(4, 8, shards), "own", "abc", "gloo", ("h", 5))
    assert Epoch.from_dict(epoch.to_dict()) == epoch
    assert epoch.stages == 2
    assert [epoch.attention_ranks(s) for s in range(2)] == [[0, 2], [1, 3]]
    assert epoch.lead.name == "attention-0"
    epoch.admit("x", "abc")
    with pytest.raises(ConfigError, match="x runs configuration def, epoch 3 runs abc"):
        epoch.admit("x", "def")
    with pytest.raises(ConfigError, match="nobody has no seat in epoch 3"):
        epoch.member("nobody")


def test_members_are_plain_values() -> None:
    assert MemberInfo("a", "experts") == MemberInfo("a", "experts")
