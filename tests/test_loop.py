from __future__ import annotations

import threading
from collections import Counter

import pytest

from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, TokenEvent
from whalepod.engine.sampler import Drawn
from whalepod.engine.scheduler import Scheduler
from whalepod.errors import Overloaded, RequestError


class Harness:
    """A loop, and a model that draws 100, 101, ... by position."""

    def __init__(
        self,
        *,
        slots: int = 4,
        blocks: int = 16,
        step_tokens: int = 32,
        max_queue: int = 8,
        max_context: int = 40,
    ) -> None:
        self.events: list[TokenEvent] = []
        self.scheduler = Scheduler(slots, blocks, 4, step_tokens)
        self.loop = EngineLoop(
            self.scheduler, self.events.append, max_queue=max_queue, max_context=max_context
        )

    def step(self, micro_batches: int = 2) -> bool:
        plan = self.loop.plan(micro_batches)
        if plan is None:
            return False
        draws = [draw for m in plan.step.micro_batches for draw in m.draws()]
        self.loop.finish(plan, [Drawn(100 + position, -0.5) for _, position in draws])
        return True

    def drain(self) -> None:
        for _ in range(500):
            if not self.step():
                return
        pytest.fail("still busy after 500 steps")

    def tokens(self, request_id: str) -> list[int]:
        return [e.token for e in self.events if e.request_id == request_id]

    def assert_empty(self) -> None:
        assert not self.loop.busy
        assert self.loop.load == 0
        assert self.scheduler.slots.free == self.scheduler.slots.size
        assert self.scheduler.blocks.free == self.scheduler.blocks.size


@pytest.fixture
def harness() -> Harness:
    return Harness()


def ask(name: str, prompt: int = 3, tokens: int = 4, **other: object) -> Request:
    return Request(name, tuple(range(prompt)), tokens, **other)  # type: ignore[arg-type]


def test_a_request_runs_to_its_length(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    harness.drain()
    assert [(e.index, e.token, e.logprob, e.finish) for e in harness.events] == [
        (0, 103, -0.5, None),
        (1, 104, -0.5, None),
        (2, 105, -0.5, None),
        (3, 106, -0.5, "length"),
    ]
    harness.assert_empty()


def test_a_stop_token_is_emitted_and_ends_the_text(harness: Harness) -> None:
    harness.loop.submit(ask("a", stop_ids=(104,)))
    harness.loop.submit(ask("b", stop_ids=(104,), ignore_eos=True))
    harness.drain()
    assert harness.tokens("a") == [103, 104]
    assert harness.tokens("b") == [103, 104, 105, 106]
    finishes = {e.request_id: e.finish for e in harness.events if e.finish}
    assert finishes == {"a": "stop", "b": "length"}


def test_a_prompt_alone_ends_when_it_is_computed(harness: Harness) -> None:
    harness.loop.submit(Request("alone", tuple(range(37)), 0))
    harness.loop.submit(Request("other", (1, 2, 3), 2))
    harness.drain()
    (event,) = [e for e in harness.events if e.request_id == "alone"]
    assert (event.index, event.token, event.finish) == (0, -1, "length")
    assert harness.tokens("other") == [103, 104]
    harness.assert_empty()


def test_replayed_tokens_are_counted_but_not_emitted_again(harness: Harness) -> None:
    harness.loop.submit(ask("a", emitted=(103, 104)))
    harness.drain()
    assert [(e.index, e.token, e.finish) for e in harness.events] == [
        (2, 105, None),
        (3, 106, "length"),
    ]


def test_counters_add_up(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    harness.loop.submit(ask("b", prompt=5, tokens=2))
    harness.drain()
    counters = harness.loop.counters
    assert (counters.steps, counters.generated) == (4, 6)
    assert counters.tokens == (3 + 3) + (5 + 1)  # the last token is never computed


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_tokens_reach_their_request_whatever_the_split(micro_batches: int) -> None:
    harness = Harness()
    for i in range(4):
        harness.loop.submit(ask(str(i), prompt=1 + 3 * i, tokens=3))
    while harness.step(micro_batches):
        pass
    for i in range(4):
        assert harness.tokens(str(i)) == [100 + 1 + 3 * i + t for t in range(3)]


def test_a_step_that_was_broken_off_is_planned_again(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    first, again = harness.loop.plan(2), harness.loop.plan(2)
    assert first is not None
    assert again is not None
    assert first.step == again.step
    harness.drain()
    assert harness.tokens("a") == [103, 104, 105, 106]


def test_cancel_frees_everything_at_the_next_plan(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    harness.loop.submit(ask("b"))
    harness.step()
    harness.loop.cancel("a")
    harness.drain()
    assert harness.tokens("a") == [103, -1]
    last = [e for e in harness.events if e.request_id == "a"][-1]
    assert (last.index, last.finish, last.error) == (1, "abort", None)
    assert harness.tokens("b") == [103, 104, 105, 106]
    harness.assert_empty()


def test_cancel_of_a_waiting_request() -> None:
    harness = Harness(slots=1)
    harness.loop.submit(ask("a"))
    harness.loop.submit(ask("b"))
    harness.step()
    harness.loop.cancel("b")
    harness.drain()
    assert harness.tokens("b") == [-1]
    harness.assert_empty()


def test_cancel_before_the_loop_has_seen_the_request(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    harness.loop.cancel("a")
    assert not harness.step()
    assert [(e.token, e.finish) for e in harness.events] == [(-1, "abort")]
    harness.assert_empty()


def test_cancel_of_the_unknown_or_finished_is_ignored(harness: Harness) -> None:
    harness.loop.submit(ask("a", tokens=1))
    harness.drain()
    harness.loop.cancel("a")
    harness.loop.cancel("ghost")
    harness.drain()
    assert len(harness.events) == 1
    harness.assert_empty()


def test_cancel_while_a_step_runs_ends_the_request_once(harness: Harness) -> None:
    harness.loop.submit(ask("a"))
    plan = harness.loop.plan(1)
    assert plan is not None
    harness.loop.cancel("a")
    harness.loop.finish(plan, [Drawn(103, 0.0)])
    harness.drain()
    assert harness.tokens("a") == [103, -1]
    assert [e.finish for e in harness.events] == [None, "abort"]
    harness.assert_empty()


def test_abort_all_ends_what_runs_waits_and_has_just_come() -> None:
    harness = Harness(slots=1)
    harness.loop.submit(ask("running"))
    harness.loop.submit(ask("waiting"))
    harness.step()
    harness.loop.submit(ask("new"))
    harness.events.clear()
    harness.loop.abort_all("going away")
    assert {(e.request_id, e.index, e.finish, e.error) for e in harness.events} == {
        ("running", 1, "error", "going away"),
        ("waiting", 0, "error", "going away"),
        ("new", 0, "error", "going away"),
    }
    assert not harness.step()
    harness.assert_empty()


@pytest.mark.parametrize(("prompt", "tokens"), [(41, 1), (1, 40), (30, 11)])
def test_a_request_beyond_the_context_is_refused(
    harness: Harness, prompt: int, tokens: int
) -> None:
    with pytest.raises(RequestError, match=rf"= {prompt + tokens} exceed the context of 40") as at:
        harness.loop.submit(ask("a", prompt, tokens))
    assert at.value.param == "max_tokens"
    assert harness.loop.load == 0


def test_a_request_of_exactly_the_context_runs(harness: Harness) -> None:
    harness.loop.submit(ask("a", 30, 10))
    harness.drain()
    assert len(harness.tokens("a")) == 10


def test_a_request_beyond_the_cache_is_refused() -> None:
    harness = Harness(blocks=2)
    with pytest.raises(RequestError, match="exceed the context of 8"):
        harness.loop.submit(ask("a", 5, 4))
    harness.loop.submit(ask("a", 4, 4))
    harness.drain()
    assert len(harness.tokens("a")) == 4


def test_a_full_queue_refuses_until_a_request_ends() -> None:
    harness = Harness(slots=1, max_queue=1)
    harness.loop.submit(ask("a", tokens=1))
    harness.loop.submit(ask("b"))
    with pytest.raises(Overloaded, match="1 requests wait and the limit is 1") as refused:
        harness.loop.submit(ask("c"))
    assert refused.value.retry_after_s > 0
    harness.step()
    harness.loop.submit(ask("c"))
    harness.drain()
    assert len(harness.tokens("c")) == 4


def test_submit_wakes_and_rings(harness: Harness) -> None:
    rings: list[int] = []
    harness.loop.ring = lambda: rings.append(1)
    harness.loop.submit(ask("a"))
    assert harness.loop.wake.is_set()
    assert rings == [1]
    assert harness.loop.busy
    assert harness.loop.load == 1


def test_many_threads_submit_and_cancel_while_one_steps() -> None:
    harness = Harness(max_queue=1000, blocks=12)
    done = threading.Event()

    def client(number: int) -> None:
        for i in range(25):
            name = f"{number}/{i}"
            harness.loop.submit(ask(name, prompt=1 + i % 7, tokens=1 + i % 5))
            if i % 3 == 0:
                harness.loop.cancel(name)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        harness.step()
        if not any(t.is_alive() for t in threads) and not harness.loop.busy:
            done.set()
    for thread in threads:
        thread.join(10)
    ends = Counter(e.request_id for e in harness.events if e.finish)
    assert len(ends) == 100
    assert set(ends.values()) == {1}
    for number in range(4):
        for i in range(25):
            mine = [e for e in harness.events if e.request_id == f"{number}/{i}"]
            assert [e.index for e in mine] == list(range(len(mine)))
            if i % 3:
                assert [e.token for e in mine] == [101 + i % 7 + t for t in range(1 + i % 5)]
    harness.assert_empty()
