"""Requests go where their prompts are known, and elsewhere when that member is busy."""

from __future__ import annotations

from whalepod.engine.affinity import Affinity, chain
from whalepod.engine.request import Request


def prompt(*ids: int, salt: str = "") -> Request:
    return Request("r", ids, 1, cache_salt=salt)


def test_digests_depend_on_every_token_before_and_on_the_salt() -> None:
    base = chain(prompt(*range(10)), 4)
    assert len(base) == 2
    assert chain(prompt(*range(8), 77, 78), 4) == base
    assert chain(prompt(9, *range(1, 10)), 4)[1] != base[1]
    assert chain(prompt(*range(4), 9, *range(5, 10)), 4)[0] == base[0]
    assert chain(prompt(*range(4), 9, *range(5, 10)), 4)[1] != base[1]
    assert not set(chain(prompt(*range(10), salt="tenant"), 4)) & set(base)
    assert chain(prompt(1, 2, 3), 4) == []


def test_emitted_tokens_count_as_known() -> None:
    replayed = Request("r", (0, 1, 2), 9, emitted=(3, 4))
    assert chain(replayed, 4) == chain(prompt(0, 1, 2, 3), 4)


def test_the_longest_known_beginning_decides() -> None:
    affinity = Affinity(100, busy=4)
    affinity.record(chain(prompt(*range(8)), 4), "a")
    affinity.record(chain(prompt(*range(4), 9, 9, 9, 9), 4), "b")
    loads = {"a": 0, "b": 0}
    assert affinity.choose(chain(prompt(*range(9)), 4), loads) == "a"
    assert affinity.choose(chain(prompt(*range(4), 9, 9, 9, 9, 1), 4), loads) == "b"
    assert affinity.choose(chain(prompt(7, 7, 7, 7), 4), loads) is None


def test_a_busy_member_is_passed_over_only_for_one_that_is_less_busy() -> None:
    affinity = Affinity(100, busy=4)
    digests = chain(prompt(*range(8)), 4)
    affinity.record(digests, "a")
    assert affinity.choose(digests, {"a": 3, "b": 0}) == "a"
    assert affinity.choose(digests, {"a": 4, "b": 3}) is None
    assert affinity.choose(digests, {"a": 4, "b": 4}) == "a"


def test_members_that_left_are_not_chosen() -> None:
    affinity = Affinity(100, busy=4)
    digests = chain(prompt(*range(8)), 4)
    affinity.record(digests, "gone")
    assert affinity.choose(digests, {"b": 0}) is None


def test_the_oldest_blocks_are_forgotten_and_beginnings_last() -> None:
    affinity = Affinity(3, busy=4)
    old, new = chain(prompt(*range(12)), 4), chain(prompt(*range(50, 58)), 4)
    affinity.record(old, "a")
    affinity.record(new, "b")
    loads = {"a": 0, "b": 0}
    assert affinity.choose(new, loads) == "b"
    assert affinity.choose(old[:1], loads) == "a"
    assert affinity.choose(old[2:], loads) is None
