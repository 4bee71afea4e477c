from __future__ import annotations

import dataclasses
import json

import pytest

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.placement import Placement
from whalepod.cluster.topology import seats_for
from whalepod.config import Config, Topology
from whalepod.errors import ConfigError


def make(topology: Topology, **other: object) -> Epoch:
    seats = seats_for(topology)
    shards = [s.name for s in seats if "expert" in s.roles]
    fields = {
        "id": 3,
        "members": seats,
        "placement": Placement.balanced(2, 6, shards),
        "router": topology.router,
        "config_digest": "abc",
        "backend": "gloo",
        "rendezvous": ("127.0.0.1", 4242),
    }
    return Epoch(**{**fields, **other})  # type: ignore[arg-type]


AFD = Topology(attention=2, stages=2, experts=3, router="own", routers=2)


def test_ranks_by_role() -> None:
    epoch = make(AFD)
    assert epoch.stages == 2
    assert epoch.attention_ranks(0) == [0, 2]
    assert epoch.attention_ranks(1) == [1, 3]
    assert epoch.router_ranks == [4, 5]
    assert [epoch.rank_of(n) for n in epoch.placement.shards] == [6, 7, 8]
    assert epoch.lead.name == "attention-0"


def test_attention_ranks_go_by_replica_not_by_rank() -> None:
    epoch = make(Topology(attention=3, router="attention"))
    members = tuple(
        dataclasses.replace(s, replica=2 - s.replica) if "attention" in s.roles else s
        for s in epoch.members
    )
    epoch = dataclasses.replace(epoch, members=members)
    assert epoch.attention_ranks(0) == [2, 1, 0]
    assert epoch.lead.rank == 2


@pytest.mark.parametrize(
    "topology",
    [
        AFD,
        Topology(layout="single"),
        Topology(layout="ep", attention=3),
        Topology(router="attention"),
    ],
    ids=["afd", "single", "ep", "legs2"],
)
def test_dict_round_trip(topology: Topology) -> None:
    epoch = make(topology)
    assert Epoch.from_dict(json.loads(json.dumps(epoch.to_dict()))) == epoch


def test_names_stand_in_rank_order() -> None:
    epoch = make(AFD)
    assert [epoch.member(n).rank for n in epoch.names] == list(range(9))


def test_a_stranger_has_no_seat() -> None:
    with pytest.raises(ConfigError, match=r"ghost has no seat in epoch 3; members: attention-0, "):
        make(AFD).member("ghost")


def test_admission_goes_by_digest() -> None:
    epoch = make(AFD)
    epoch.admit("attention-0", "abc")
    with pytest.raises(ConfigError, match=r"attention-0 runs configuration xyz.*runs abc"):
        epoch.admit("attention-0", "xyz")


def digest(**sections: object) -> str:
    return Config.from_dict({"model": {"path": "/m"}, **sections}).digest


def test_digest_ignores_what_may_change_while_the_cluster_runs() -> None:
    same = [
        digest(),
        digest(topology={"attention": 5}),
        digest(topology={"experts": 7}),
        digest(server={"http_port": 1234}),
    ]
    assert len(set(same)) == 1


def test_digest_tells_apart_what_members_must_agree_on() -> None:
    digests = [
        digest(),
        digest(model={"path": "/other"}),
        digest(model={"path": "/m", "dtype": "bf16"}),
        digest(topology={"layout": "ep"}),
        digest(topology={"router": "attention"}),
        digest(topology={"stages": 2}),
        digest(topology={"micro_batches": 1}),
        digest(engine={"max_step_tokens": 64}),
        digest(cluster={"fabric": "nccl"}),
    ]
    assert len(set(digests)) == len(digests)
