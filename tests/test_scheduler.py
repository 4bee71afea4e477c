from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.engine.blocks import BlockPool
from whalepod.engine.request import Request, Sequence
from whalepod.engine.scheduler import Scheduler
from whalepod.engine.step import Part
from whalepod.errors import OutOfBlocks

VOCABULARY = 97


def next_token(tokens: list[int]) -> int:
    """Return what the fake model draws: every token and its place count."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCABULARY


def plain_completion(request: Request) -> list[int]:
    """Return all tokens after the prompt, one after the other, without any scheduler."""
    tokens = [*request.prompt_ids, *request.emitted]
    while len(tokens) - len(request.prompt_ids) < request.max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_ids:
            break
    return tokens[len(request.prompt_ids) :]


@dataclass
class FakeModel:
    """Keeps tokens where the block tables say, and draws from what it reads back there."""

    block_tokens: int
    memory: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def run(self, parts: list[Part]) -> dict[int, int]:
        """Write each part's tokens; returns the token drawn for each slot that draws."""
        per = self.block_tokens
        drawn = {}
        for part in parts:
            end = part.start + len(part.ids)
            assert len(part.blocks) * per >= end, "the block table is too short"
            for position, token in zip(range(part.start, end), part.ids, strict=True):
                self.memory[part.blocks[position // per]][position % per] = token
        # Reading after all have written shows any block that two sequences share.
        for part in parts:
            end = part.start + len(part.ids)
            seen = [self.memory[part.blocks[p // per]][p % per] for p in range(end)]
            if part.draw is not None:
                assert part.draw[1] == end
                drawn[part.slot] = next_token(seen)
        return drawn


def request(name: str, prompt: int, tokens: int = 4, emitted: tuple[int, ...] = ()) -> Request:
    return Request(name, tuple(range(1, prompt + 1)), tokens, emitted=emitted)


def sequence(name: str, prompt: int, tokens: int = 4) -> Sequence:
    return Sequence(request(name, prompt, tokens))


def shape(planned: list[tuple[Sequence, Part]]) -> list[tuple[str, int, int]]:
    return [(s.request.id, p.start, len(p.ids)) for s, p in planned]


def advance(scheduler: Scheduler, planned: list[tuple[Sequence, Part]]) -> None:
    """Finish a step; every part that draws gets a token."""
    scheduler.advance(planned)
    for s, part in planned:
        if part.draw is not None:
            s.accept(1, 0.0)


# -- block pools --------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 5), max_size=40))
def test_a_pool_never_hands_a_number_out_twice(program: list[int]) -> None:
    pool, held = BlockPool(8), list[list[int]]()
    for count in program:
        if count < 0:
            if held:
                pool.give_back(held.pop(count % len(held)))
        elif count > pool.free:
            with pytest.raises(OutOfBlocks):
                pool.take(count)
        else:
            held.append(pool.take(count))
        out = [n for numbers in held for n in numbers]
        assert len(out) == len(set(out))
        assert set(out) <= set(range(8))
        assert pool.free == 8 - len(out)


def test_giving_back_empties_the_list() -> None:
    pool = BlockPool(3)
    numbers = pool.take(2)
    pool.give_back(numbers)
    assert numbers == []
    assert pool.free == 3


# -- plans --------------------------------------------------------------------------------


def test_nothing_to_do_plans_nothing() -> None:
    scheduler = Scheduler(2, 4, 8, 16)
    assert scheduler.plan() == []
    assert not scheduler.busy


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = Scheduler(2, 8, 4, 6)
    scheduler.add(sequence("a", 15))
    chunks, draws = [], []
    for _ in range(4):
        planned = scheduler.plan()
        chunks += shape(planned)
        draws += [p.draw is not None for _, p in planned]
        advance(scheduler, planned)
    assert chunks == [("a", 0, 6), ("a", 6, 6), ("a", 12, 3), ("a", 15, 1)]
    assert draws == [False, False, True, True]


def test_decodes_come_before_prefill() -> None:
    scheduler = Scheduler(3, 16, 4, 6)
    scheduler.add(sequence("long", 4))
    advance(scheduler, scheduler.plan())
    scheduler.add(sequence("new", 9))
    planned = scheduler.plan()
    assert shape(planned) == [("long", 4, 1), ("new", 0, 5)]
    advance(scheduler, planned)
    # The chunk that goes on still stands behind the decodes.
    assert shape(scheduler.plan()) == [("long", 5, 1), ("new", 5, 4)]


def test_an_older_prefill_does_not_starve_decodes() -> None:
    scheduler = Scheduler(3, 32, 4, 4)
    scheduler.add(sequence("short", 1))
    scheduler.add(sequence("long", 30))
    advance(scheduler, scheduler.plan())
    scheduler.running.reverse()  # now the prefill is the older one
    assert shape(scheduler.plan()) == [("short", 1, 1), ("long", 3, 3)]


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler = Scheduler(2, 16, 4, 64)
    for name, prompt in (("a", 3), ("b", 5), ("c", 1)):
        scheduler.add(sequence(name, prompt))
    planned = scheduler.plan()
    assert shape(planned) == [("a", 0, 3), ("b", 0, 5)]  # two slots
    scheduler.drop(planned[0][0])
    assert shape(scheduler.plan()) == [("c", 0, 1), ("b", 0, 5)]


def test_a_request_that_waits_for_blocks_is_not_overtaken() -> None:
    scheduler = Scheduler(4, 4, 4, 64)
    for name, prompt in (("a", 8), ("big", 12), ("tiny", 1)):
        scheduler.add(sequence(name, prompt))
    assert shape(scheduler.plan()) == [("a", 0, 8)]
    assert [s.request.id for s in scheduler.waiting] == ["big", "tiny"]


def test_planning_again_without_advance_plans_the_same() -> None:
    scheduler = Scheduler(4, 16, 4, 10)
    for name, prompt in (("a", 7), ("b", 6), ("c", 2)):
        scheduler.add(sequence(name, prompt))
    first = scheduler.plan()
    assert shape(scheduler.plan()) == shape(first) == [("a", 0, 7), ("b", 0, 1), ("c", 0, 2)]


def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    scheduler = Scheduler(2, 2, 4, 64)
    scheduler.add(sequence("old", 4))
    scheduler.add(sequence("young", 4))
    advance(scheduler, scheduler.plan())
    planned = scheduler.plan()  # both need a second block and there is none
    assert shape(planned) == [("old", 4, 1)]
    assert scheduler.preemptions == 1
    (young,) = scheduler.waiting
    assert (young.request.id, young.computed, young.slot, young.blocks) == ("young", 0, -1, [])
    assert len(young.tokens) == 5  # what it has generated stays
    scheduler.drop(planned[0][0])
    assert shape(scheduler.plan()) == [("young", 0, 5)]


def test_the_preempted_stand_before_those_that_came_later() -> None:
    scheduler = Scheduler(2, 2, 4, 64)
    for name in ("old", "young", "late"):
        scheduler.add(sequence(name, 4))
    advance(scheduler, scheduler.plan())
    advance(scheduler, scheduler.plan())
    assert [s.request.id for s in scheduler.waiting] == ["young", "late"]


def test_who_gives_way_after_being_planned_leaves_the_plan() -> None:
    scheduler = Scheduler(2, 3, 4, 5)
    old, young = sequence("old", 9), sequence("young", 4)
    scheduler.add(old)
    advance(scheduler, scheduler.plan())  # a chunk of five: two blocks
    scheduler.add(young)
    young.slot = scheduler.slots.take(1)[0]
    scheduler.waiting.remove(young)
    scheduler.running.append(young)
    young.computed = 3
    # The young one decodes and is planned first; the old one then needs the block it took.
    assert shape(scheduler.plan()) == [("old", 5, 4)]
    assert (list(scheduler.waiting), young.slot, young.blocks) == ([young], -1, [])


def test_drop_frees_whatever_is_held() -> None:
    scheduler = Scheduler(1, 4, 4, 64)
    running, waiting, stranger = (sequence(n, 4) for n in "rws")
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.plan()
    for s in (waiting, running, running, stranger):
        scheduler.drop(s)
    assert not scheduler.busy
    assert (scheduler.slots.free, scheduler.blocks.free) == (1, 4)


@pytest.mark.parametrize(("tokens", "fits"), [(1, True), (32, True), (33, False)])
def test_fits_is_about_a_sequence_alone(tokens: int, fits: bool) -> None:
    assert Scheduler(2, 4, 8, 16).fits(tokens) is fits


# -- random programs ----------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[Scheduler, list[tuple[int, Request]], dict[int, str]]:
    """Draw sizes, requests with the step at which they arrive, and events at some steps."""
    block_tokens, blocks = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    scheduler = Scheduler(draw(st.integers(1, 5)), blocks, block_tokens, draw(st.integers(1, 12)))
    room = block_tokens * blocks
    arrivals = []
    for i in range(draw(st.integers(1, 7))):
        prompt = draw(st.integers(1, room - 1))
        tokens = draw(st.integers(1, room - prompt))
        ids = draw(st.lists(st.integers(0, 96), min_size=prompt, max_size=prompt))
        made = Request(str(i), tuple(ids), tokens, stop_ids=draw(st.sampled_from([(), (5, 60)])))
        replayed = draw(st.integers(0, 3))
        already = tuple(plain_completion(made)[:-1][:replayed])
        made = Request(
            made.id, made.prompt_ids, tokens, made.sampling, made.stop_ids, False, already
        )
        arrivals.append((draw(st.integers(0, 12)), made))
    kinds = st.sampled_from(["lost", "drop"])
    return scheduler, arrivals, draw(st.dictionaries(st.integers(0, 25), kinds, max_size=6))


def check_plan(scheduler: Scheduler, planned: list[tuple[Sequence, Part]]) -> None:
    assert sum(len(p.ids) for _, p in planned) <= scheduler.step_tokens
    assert len({p.slot for _, p in planned}) == len(planned)
    for s, part in planned:
        assert (part.slot, part.start) == (s.slot, s.computed)
        assert list(part.ids) == s.tokens[part.start : part.start + len(part.ids)]
    blocks = [b for s in scheduler.running for b in s.blocks]
    assert len(blocks) == len(set(blocks)) == scheduler.blocks.size - scheduler.blocks.free
    assert len(scheduler.running) == scheduler.slots.size - scheduler.slots.free


@given(programs())
@settings(max_examples=300, deadline=None)
def test_preemption_loses_and_duplicates_nothing(
    program: tuple[Scheduler, list[tuple[int, Request]], dict[int, str]],
) -> None:
    scheduler, arrivals, events = program
    model = FakeModel(scheduler.block_tokens)
    out: dict[str, list[int]] = {r.id: list(r.emitted) for _, r in arrivals}
    dropped: set[str] = set()
    step, last = 0, max(at for at, _ in arrivals)
    while scheduler.busy or step <= last:
        for at, made in arrivals:
            if at == step:
                scheduler.add(Sequence(made))
        planned = scheduler.plan()
        check_plan(scheduler, planned)
        assert planned or not scheduler.busy, "busy, and yet nothing to run"
        drawn = model.run([part for _, part in planned])
        if events.get(step) != "lost":  # a lost step is run again: its results are not taken in
            scheduler.advance(planned)
            for s, part in planned:
                if part.draw is None:
                    continue
                event = s.accept(drawn[part.slot], 0.0)
                assert event.index == len(out[event.request_id])
                out[event.request_id].append(event.token)
                if event.finish:
                    scheduler.drop(s)
        if events.get(step) == "drop" and scheduler.running:
            dropped.add(scheduler.running[0].request.id)
            scheduler.drop(scheduler.running[0])
        step += 1
        assert step < 2000, "no progress"
    for _, made in arrivals:
        expected = plain_completion(made)
        if made.id in dropped:
            expected = expected[: len(out[made.id])]
        assert out[made.id] == expected
    assert scheduler.slots.free == scheduler.slots.size
    assert scheduler.blocks.free == scheduler.blocks.size
