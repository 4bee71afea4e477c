"""Who goes first: shares of a step, priorities, and who gives way; all must come to an end."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import (
    FakeModel,
    advance,
    check_plan,
    plain_completion,
    request,
    sequence,
    shape,
)

from whalepod.engine.fairness import divide, rank
from whalepod.engine.request import Request, Sequence
from whalepod.engine.scheduler import Scheduler


def running(*pending: int, priority: int = 0) -> list[Sequence]:
    made = []
    for i, count in enumerate(pending):
        item = Sequence(dataclasses.replace(request(f"{i}", count), priority=priority))
        item.arrived = i
        made.append(item)
    return made


def rows(sequences: list[Sequence], budget: int, drafts: int = 0) -> list[int]:
    found = divide(sequences, budget, lambda s: drafts)
    return [found.get(s, 0) for s in sequences]


@pytest.mark.parametrize(
    ("pending", "budget", "expected"),
    [
        ((100, 100), 64, [64, 0]),  # equals in order of arrival
        ((100, 10), 64, [54, 10]),  # what the short one leaves goes to the first
        ((100, 50), 64, [32, 32]),
        ((1000, 900, 20), 64, [32, 12, 20]),
        ((1000, 900, 90, 20), 64, [32, 0, 12, 20]),
        ((5, 7, 9), 64, [5, 7, 9]),
        ((1, 100, 1), 8, [1, 6, 1]),  # decodes first
        ((1, 1, 1, 1, 100), 4, [1, 1, 1, 0, 1]),  # a quarter stays for prefills
        ((1, 1, 1, 1), 4, [1, 1, 1, 1]),
        ((100, 1), 1, [0, 1]),
    ],
)
def test_a_step_is_shared(pending: tuple[int, ...], budget: int, expected: list[int]) -> None:
    assert rows(running(*pending), budget) == expected


def test_drafts_take_what_decodes_leave_but_not_what_prefills_are_owed() -> None:
    assert rows(running(1, 1, 1), 8, drafts=3) == [4, 3, 1]
    assert rows(running(1, 1, 100), 8, drafts=3) == [4, 2, 2]


def test_a_better_priority_takes_all_it_can() -> None:
    low, high = running(100, 3, priority=1), running(50, 40, priority=0)
    ordered = sorted([*low, *high], key=rank)
    found = divide(ordered, 64, lambda s: 0)
    assert [found.get(s, 0) for s in (*high, *low)] == [50, 14, 0, 0]
    found = divide(ordered, 96, lambda s: 0)
    assert [found.get(s, 0) for s in (*high, *low)] == [50, 40, 3, 3]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.integers(1, 128))
def test_no_row_is_wasted_or_given_twice(pending: list[int], budget: int) -> None:
    found = rows(running(*pending), budget)
    assert all(0 <= got <= want for got, want in zip(found, pending, strict=True))
    assert sum(found) == min(budget, sum(pending))


def test_decodes_that_find_no_row_are_the_first_of_the_next_step() -> None:
    scheduler = Scheduler(6, 32, 4, 4)
    for i in range(5):
        scheduler.add(sequence(f"{i}", 1, tokens=20))
    seen: list[list[str]] = []
    for _ in range(5):
        planned = scheduler.plan()
        seen.append(sorted(s.request.id for s, _ in planned))
        advance(scheduler, planned)
    everyone = {"0", "1", "2", "3", "4"}
    left_out = [everyone - set(names) for names in seen]
    assert all(len(names) == 1 for names in left_out)
    assert all(a != b for a, b in pairwise(left_out))


def first_token_after(scheduler: Scheduler, wanted: str, limit: int) -> int:
    for step in range(1, limit + 1):
        planned = scheduler.plan()
        if any(s.request.id == wanted and p.draw is not None for s, p in planned):
            return step
        advance(scheduler, planned)
    pytest.fail(f"no token of {wanted} within {limit} steps")


@pytest.mark.parametrize("longs", [1, 3])
def test_a_short_prompt_does_not_stand_behind_long_ones(longs: int) -> None:
    scheduler = Scheduler(8, 4000, 128, 512)
    for i in range(longs):
        scheduler.add(sequence(f"long{i}", 100_000))
    advance(scheduler, scheduler.plan())
    scheduler.add(sequence("short", 1000))
    assert first_token_after(scheduler, "short", 4) == math.ceil(1000 / 256)


def test_a_long_prompt_goes_on_whatever_short_ones_come() -> None:
    scheduler = Scheduler(8, 4000, 128, 512)
    scheduler.add(sequence("long", 10_000))
    for step in range(math.ceil(10_000 / 256) + 1):
        scheduler.add(sequence(f"short{step}", 500, tokens=1))
        planned = scheduler.plan()
        if any(s.request.id == "long" and p.draw is not None for s, p in planned):
            break
        advance(scheduler, planned)
        for s, part in planned:
            if part.draw is not None:
                scheduler.drop(s)
    else:
        pytest.fail("the long prompt did not get its half of every step")


def test_what_another_has_left_meanwhile_is_found_before_the_first_rows() -> None:
    scheduler = Scheduler(2, 16, 4, 8, snapshots=range(2, 6))
    for name in ("first", "second"):
        scheduler.add(sequence(name, 17))
    chunks = []
    for _ in range(3):
        planned = scheduler.plan()
        chunks += shape(planned)
        advance(scheduler, planned)
    # Both were admitted at once; the second goes on from where the first had got in the step before.
    assert chunks == [("first", 0, 8), ("first", 8, 8), ("first", 16, 1), ("second", 16, 1)]
    assert scheduler.prefixes.hit_tokens == 16
    assert scheduler.prefixes.asked_tokens == 34


def test_a_step_is_not_empty_because_whose_turn_it_was_gave_way() -> None:
    scheduler = Scheduler(2, 2, 4, 8)
    scheduler.add(sequence("old", 1))
    scheduler.add(sequence("young", 4))
    advance(scheduler, scheduler.plan())
    scheduler.step_tokens = 1
    advance(scheduler, scheduler.plan())
    # It is the young one's turn now, which needs a second block and is the last in order itself.
    assert shape(scheduler.plan()) == [("old", 2, 1)]
    assert [s.request.id for s in scheduler.waiting] == ["young"]


def prioritised(name: str, prompt: int, priority: int, tokens: int = 4) -> Sequence:
    return Sequence(dataclasses.replace(request(name, prompt, tokens), priority=priority))


def test_the_lowest_number_is_admitted_first_and_arrival_breaks_ties() -> None:
    scheduler = Scheduler(1, 16, 4, 64)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        scheduler.add(prioritised(name, 3, priority))
    order = []
    while scheduler.busy:
        ((s, _),) = planned = scheduler.plan()
        order.append(s.request.id)
        advance(scheduler, planned)
        scheduler.drop(s)
    assert order == ["d", "b", "c", "a"]


def test_the_victim_is_the_youngest_of_the_lowest_priority() -> None:
    scheduler = Scheduler(4, 3, 4, 64)
    for name, priority in (("low", 5), ("old", 0), ("young", 0)):
        scheduler.add(prioritised(name, 4, priority))
    advance(scheduler, scheduler.plan())
    planned = scheduler.plan()  # all need a second block and there is none
    assert shape(planned) == [("old", 4, 1)]
    assert [s.request.id for s in scheduler.waiting] == ["young", "low"]


@pytest.mark.parametrize("lacking", ["slots", "blocks"])
def test_a_better_priority_does_not_wait_for_room(lacking: str) -> None:
    slots, blocks = (2, 32) if lacking == "slots" else (8, 4)
    scheduler = Scheduler(slots, blocks, 4, 64)
    for name in ("a", "b"):
        scheduler.add(prioritised(name, 7, 1))
    advance(scheduler, scheduler.plan())
    scheduler.add(prioritised("equal", 6, 1))
    assert shape(scheduler.plan()) == [("a", 7, 1), ("b", 7, 1)]
    scheduler.add(prioritised("urgent", 6, 0))
    assert shape(scheduler.plan()) == [("a", 7, 1), ("urgent", 0, 6)]
    assert [s.request.id for s in scheduler.waiting] == ["b", "equal"]


def test_nobody_gives_way_where_that_would_not_be_enough() -> None:
    scheduler = Scheduler(8, 4, 4, 64)
    scheduler.add(prioritised("high", 7, 0))
    scheduler.add(prioritised("low", 7, 1))
    advance(scheduler, scheduler.plan())
    scheduler.add(prioritised("urgent", 12, -1))
    scheduler.running[0].displaced = 99  # has given way often enough
    assert shape(scheduler.plan()) == [("high", 7, 1), ("low", 7, 1)]
    assert scheduler.preemptions == 0


def test_a_stream_of_urgent_requests_cannot_keep_one_from_its_end() -> None:
    scheduler = Scheduler(1, 16, 4, 4)
    scheduler.add(prioritised("low", 12, 1, tokens=2))
    done = False
    for step in range(60):
        scheduler.add(prioritised(f"urgent{step}", 4, 0, tokens=1))
        planned = scheduler.plan()
        advance(scheduler, planned)
        for s, part in planned:
            if part.draw is not None and s.generated == s.request.max_tokens:
                scheduler.drop(s)
                done |= s.request.id == "low"
        scheduler.waiting[1:] = [s for s in scheduler.waiting[1:] if s.request.id == "low"]
    assert not done  # strictly lower: it waits while others come
    assert scheduler.preemptions <= 3


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Scheduler, list[Request]]:
    """A pool that holds the longest of them just so, and requests that all want much of it."""
    block_tokens, blocks = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    scheduler = Scheduler(draw(st.integers(1, 6)), blocks, block_tokens, draw(st.integers(1, 9)))
    room = block_tokens * blocks
    made = []
    for i in range(draw(st.integers(2, 8))):
        prompt = draw(st.integers(1, room - 1))
        tokens = draw(st.integers(1, room - prompt))
        made.append(Request(str(i), tuple(range(prompt)), tokens, priority=draw(st.integers(0, 2))))
    return scheduler, made


@given(crowds())
@settings(max_examples=300, deadline=None)
def test_preemption_comes_to_an_end(crowd: tuple[Scheduler, list[Request]]) -> None:
    """The first in order is never preempted; so the steps are those of one after the other at most."""
    scheduler, todo = crowd
    model = FakeModel(scheduler.block_tokens)
    for item in todo:
        scheduler.add(Sequence(item))
    out: dict[str, list[int]] = {item.id: [] for item in todo}
    steps = 0
    while scheduler.busy:
        first = min([*scheduler.running, *scheduler.waiting], key=rank)
        before = first.computed
        planned = scheduler.plan()
        check_plan(scheduler, planned)
        assert first in scheduler.running
        assert first.computed == before
        drawn = model.run([part for _, part in planned])
        scheduler.advance(planned)
        for s, part in planned:
            if part.draw is not None:
                event = s.accept(drawn[part.slot], 0.0)
                out[s.request.id].append(event.token)
                if event.finish:
                    scheduler.drop(s)
        steps += 1
        assert steps <= len(todo) * sum(len(r.prompt_ids) + r.max_tokens for r in todo)
    for item in todo:
        assert out[item.id] == plain_completion(item)
    assert scheduler.blocks.free == scheduler.blocks.size
