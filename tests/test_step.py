from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalepod.engine.request import Sampling
from whalepod.engine.step import MicroBatch, Part, Step, split

samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 50),
    seed=st.integers(0, 2**64 - 1),
)
draws = st.none() | st.tuples(samplings, st.integers(1, 10**6))


@st.composite
def part_lists(draw: st.DrawFn, most: int = 12) -> list[Part]:
    count = draw(st.integers(0, most))
    return [
        Part(
            slot,
            draw(st.integers(0, 10**6)),
            tuple(draw(st.lists(st.integers(0, 200_000), min_size=1, max_size=6))),
            tuple(draw(st.lists(st.integers(0, 5000), max_size=4))),
            draw(draws),
        )
        for slot in range(count)
    ]


@given(part_lists(), st.integers(1, 3))
def test_bytes_round_trip(parts: list[Part], count: int) -> None:
    step = split(parts, count)
    again = Step.from_bytes(step.to_bytes())
    assert again == step
    assert hash(again) == hash(step)  # tuples all the way down, as frozen as the original


@given(part_lists(), st.integers(-1, 4))
def test_split_spreads_every_part_once(parts: list[Part], count: int) -> None:
    step = split(parts, count)
    found = [p for m in step.micro_batches for p in m.parts]
    assert sorted(found, key=lambda p: p.slot) == parts
    assert len(step.micro_batches) == min(max(count, 1), len(parts))
    assert all(m.parts for m in step.micro_batches)
    assert step.tokens == sum(len(p.ids) for p in parts)


@given(part_lists(), st.integers(1, 3))
def test_split_puts_single_tokens_first(parts: list[Part], count: int) -> None:
    for micro_batch in split(parts, count).micro_batches:
        chunk = [len(p.ids) > 1 for p in micro_batch.parts]
        assert chunk == sorted(chunk)


@given(part_lists(), st.integers(1, 3))
def test_split_is_about_even(parts: list[Part], count: int) -> None:
    loads = [m.tokens for m in split(parts, count).micro_batches]
    largest = max((len(p.ids) for p in parts), default=0)
    assert not loads or max(loads) - min(loads) <= largest


def part(slot: int, ids: int, *, draws: bool, start: int = 0) -> Part:
    drawing = (Sampling(seed=slot), start + ids) if draws else None
    return Part(slot, start, tuple(range(ids)), (0,), drawing)


def test_last_rows_and_draws_go_together() -> None:
    micro_batch = MicroBatch(
        (part(0, 1, draws=True), part(1, 3, draws=False), part(2, 2, draws=True))
    )
    assert micro_batch.tokens == 6
    assert micro_batch.last_rows() == [0, 5]
    assert [s.seed for s, _ in micro_batch.draws()] == [0, 2]
    assert [position for _, position in micro_batch.draws()] == [1, 2]


def test_batch_lays_the_parts_out_as_rows() -> None:
    micro_batch = MicroBatch(
        (part(4, 1, draws=True, start=9), Part(2, 128, (5, 6, 7), (3, 1), None))
    )
    batch = micro_batch.batch(128)
    assert batch.ids_T.tolist() == [0, 5, 6, 7]
    assert batch.positions_T.tolist() == [9, 128, 129, 130]
    assert [(s.slot, s.row, s.count, s.blocks) for s in batch.spans] == [
        (4, 0, 1, (0,)),
        (2, 1, 3, (3, 1)),
    ]
    assert batch.decoding == 1


def test_no_parts_make_no_micro_batches() -> None:
    assert split([], 2) == Step(())
    assert Step.from_bytes(Step(()).to_bytes()) == Step(())


def test_a_step_cannot_change() -> None:
    with pytest.raises(AttributeError):
        split([], 1).micro_batches = ()  # type: ignore[misc]
