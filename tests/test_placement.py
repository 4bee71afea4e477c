import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.cluster.placement import Placement
from whalepod.errors import ConfigError

names = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=8, unique=True)


def loads(placement: Placement, layer: int = 0) -> list[int]:
    return [len(placement.experts_of(s, layer)) for s in placement.shards]


def covered(placement: Placement) -> bool:
    return not placement.missing(placement.shards)


@settings(deadline=None)
@given(names, st.integers(1, 40), st.integers(0, 2))
def test_balanced_is_even_and_whole(shards: list[str], experts: int, replicas: int) -> None:
    if replicas + 1 > len(shards):
        with pytest.raises(ConfigError, match="need as many shards"):
            Placement.balanced(2, experts, shards, replicas)
        return
    placement = Placement.balanced(2, experts, shards, replicas)
    assert covered(placement)
    assert sum(loads(placement)) == experts * (replicas + 1)
    assert max(loads(placement)) - min(loads(placement)) <= replicas + 1
    assert Placement.from_dict(placement.to_dict()) == placement


@settings(deadline=None)
@given(names, names, st.integers(1, 40))
def test_moving_keeps_balance_and_moves_no_more_than_it_must(
    old: list[str], new: list[str], experts: int
) -> None:
    before = Placement.balanced(1, experts, old)
    after = before.moved_to(new)
    assert covered(after)
    assert after.version == before.version + 1
    assert max(loads(after)) - min(loads(after)) <= 1
    stay = set(old) & set(new)
    moved = sum(
        after.shards[after.shards_of(0, e)[0]] != before.shards[before.shards_of(0, e)[0]]
        for e in range(experts)
    )
    # What must move: experts of shards that left, and what overfull survivors give up.
    largest = sorted((len(before.experts_of(s, 0)) for s in stay), reverse=True)
    room = sorted((len(after.experts_of(s, 0)) for s in stay), reverse=True)
    kept = sum(min(have, may) for have, may in zip(largest, room, strict=True))
    assert moved == experts - kept


def test_missing_names_what_no_survivor_holds() -> None:
    placement = Placement.balanced(2, 6, ["a", "b", "c"])
    assert placement.missing(["a", "c"]) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert placement.missing(["a", "b", "c"]) == []


def test_holes_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer 0 expert 1 is placed on shards"):
        Placement(("a",), (((0,), ()),))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are 1 shards"):
        Placement(("a",), (((1,),),))  # type: ignore[arg-type]
