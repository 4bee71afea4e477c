from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.cluster.placement import Placement
from whalepod.errors import ConfigError

counts = st.integers(1, 9)


def names(count: int, start: int = 0) -> list[str]:
    return [f"e{i}" for i in range(start, start + count)]


def loads(placement: Placement, layer: int) -> Counter[str]:
    held: Counter[str] = Counter(dict.fromkeys(placement.shards, 0))
    for at in placement.holders[layer]:
        held.update(placement.shards[s] for s in at)
    return held


def spread(placement: Placement, layer: int) -> int:
    held = loads(placement, layer).values()
    return max(held) - min(held)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Draw layers, experts, shards, replicas."""
    shards = draw(counts)
    return (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        shards,
        draw(st.integers(0, min(2, shards - 1))),
    )


@given(sizes())
def test_balanced_covers_everything_within_one(size: tuple[int, int, int, int]) -> None:
    layers, experts, shards, replicas = size
    placement = Placement.balanced(layers, experts, names(shards), replicas)
    assert len(placement.holders) == layers
    for layer in range(layers):
        assert len(placement.holders[layer]) == experts
        for expert in range(experts):
            at = placement.shards_of(layer, expert)
            assert len(at) == len(set(at)) == replicas + 1
        assert spread(placement, layer) <= 1


@given(sizes())
def test_balanced_places_contiguous_runs(size: tuple[int, int, int, int]) -> None:
    layers, experts, shards, _ = size
    placement = Placement.balanced(layers, experts, names(shards))
    for shard in placement.shards:
        run = placement.experts_of(shard, layers - 1)
        assert list(run) == list(range(run[0], run[0] + len(run))) if run else True


@given(sizes())
def test_experts_of_is_the_inverse_of_shards_of(size: tuple[int, int, int, int]) -> None:
    layers, experts, shards, replicas = size
    placement = Placement.balanced(layers, experts, names(shards), replicas)
    for layer in range(layers):
        for i, shard in enumerate(placement.shards):
            expected = [e for e in range(experts) if i in placement.shards_of(layer, e)]
            assert list(placement.experts_of(shard, layer)) == expected
    assert placement.experts_of("nobody", 0) == ()


def least_moves(before: Placement, layer: int, after: list[str]) -> int:
    """Copies that any even placement of one-copy experts on `after` must load anew."""
    held = loads(before, layer)
    total = len(before.holders[layer])
    fullest_first = sorted((held.get(name, 0) for name in after), reverse=True)
    room = [total // len(after) + (i < total % len(after)) for i in range(len(after))]
    stay = sum(min(have, may) for have, may in zip(fullest_first, room, strict=True))
    return total - stay


def moves(before: Placement, after: Placement, layer: int) -> int:
    return sum(
        after.shards[s] not in {before.shards[o] for o in old}
        for old, new in zip(before.holders[layer], after.holders[layer], strict=True)
        for s in new
    )


changes = st.lists(
    st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=6
)  # (join, which)


@given(st.integers(1, 40), counts, changes)
@settings(max_examples=150)
def test_moves_balance_cover_and_move_no_more_than_needed(
    experts: int, shards: int, steps: list[tuple[bool, int]]
) -> None:
    placement, present, fresh = Placement.balanced(2, experts, names(shards)), names(shards), 100
    for join, which in steps:
        if join or len(present) == 1:
            present = list(present)
            present.insert(which % (len(present) + 1), f"e{fresh}")
            fresh += 1
        else:
            present = [n for i, n in enumerate(present) if i != which % len(present)]
        after = placement.moved_to(present)
        assert after.shards == tuple(present)
        assert after.version == placement.version + 1
        for layer in range(2):
            assert all(len(at) == 1 for at in after.holders[layer])
            assert spread(after, layer) <= 1
            assert moves(placement, after, layer) == least_moves(placement, layer, present)
        assert after.missing(present) == []
        placement = after


@given(st.integers(1, 30), st.integers(2, 8), st.integers(0, 7))
def test_a_lost_shard_of_a_replicated_placement_is_covered_again(
    experts: int, shards: int, gone: int
) -> None:
    before = Placement.balanced(1, experts, names(shards), 1)
    present = [n for i, n in enumerate(names(shards)) if i != gone % shards]
    assert before.missing(present) == []
    after = before.moved_to(present)
    for at in after.holders[0]:
        assert len(at) == len(set(at)) == min(2, len(present))
    assert spread(after, 0) <= 1


def test_an_unchanged_set_moves_nothing() -> None:
    before = Placement.balanced(2, 10, names(3))
    after = before.moved_to(names(3))
    assert after.holders == before.holders
    reordered = before.moved_to(["e2", "e0", "e1"])
    assert all(
        reordered.experts_of(n, layer) == before.experts_of(n, layer)
        for n in names(3)
        for layer in range(2)
    )


def test_missing_names_what_only_the_dead_held() -> None:
    placement = Placement.balanced(2, 4, ["a", "b"])
    assert placement.missing(["a", "b"]) == []
    assert placement.missing({"a"}) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert len(placement.missing([])) == 8


@given(sizes(), counts)
def test_dict_round_trip(size: tuple[int, int, int, int], other: int) -> None:
    layers, experts, shards, replicas = size
    placement = Placement.balanced(layers, experts, names(shards), replicas)
    for p in (placement, placement.moved_to(names(other, 2))):
        assert Placement.from_dict(json.loads(json.dumps(p.to_dict()))) == p


def test_equal_layers_are_stored_once() -> None:
    assert len(Placement.balanced(61, 384, names(8)).to_dict()["tables"]) == 1


@pytest.mark.parametrize(("shards", "replicas"), [(0, 0), (1, 1), (2, 2)])
def test_more_copies_than_shards_are_refused(shards: int, replicas: int) -> None:
    with pytest.raises(ConfigError, match="copies"):
        Placement.balanced(1, 4, names(shards), replicas)


@pytest.mark.parametrize("at", [(), (0, 0), (2,), (-1,)])
def test_impossible_tables_are_refused(at: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="layer 0 expert 1"):
        Placement.from_dict(
            {"shards": ["a", "b"], "version": 1, "tables": [[[0], list(at)]], "layers": [0]}
        )
