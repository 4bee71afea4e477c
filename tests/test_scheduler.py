"""Planning against a model that is a hash of the tokens so far."""

from __future__ import annotations

import random

import pytest

from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.sampler import Drawn
from whalepod.engine.scheduler import Scheduler
from whalepod.engine.step import Part, Step, split
from whalepod.errors import OutOfBlocks, Overloaded, RequestError


class Machine:
    """Stands for stage and cache: knows what each slot holds, and refuses gaps."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.slots: dict[int, list[int]] = {}
        self.owner: dict[int, int] = {}

    def run(self, step: Step) -> list[Drawn]:
        drawn = []
        blocks = [b for m in step.micro_batches for p in m.parts for b in p.blocks]
        assert len(blocks) == len(set(blocks)), "a block belongs to two sequences"
        for micro_batch in step.micro_batches:
            for part in micro_batch.parts:
                held = self.slots.setdefault(part.slot, []) if part.start else []
                assert len(held) >= part.start, "tokens were skipped"
                held = held[: part.start] + list(part.ids)
                assert len(part.blocks) * self.block_tokens >= len(held)
                self.slots[part.slot] = held
                if part.draw is not None:
                    assert part.draw[1] == len(held)
                    drawn.append(Drawn(following(held), 0.0))
        return drawn


def following(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 1000 + 2


def truth(request: Request) -> list[int]:
    tokens = [*request.prompt_ids, *request.emitted]
    out = []
    while len(tokens) - len(request.prompt_ids) < request.max_tokens:
        token = following(tokens)
        tokens.append(token)
        out.append(token)
        if token in request.stop_ids:
            break
    return out


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_neither_lose_nor_repeat_a_token(seed: int) -> None:
    """Submissions, cancellations, preemptions and broken-off steps in any order."""
    rng = random.Random(seed)
    blocks, per = rng.randint(4, 12), 8
    scheduler = Scheduler(rng.randint(1, 5), blocks, per, rng.randint(3, 40))
    events: dict[str, list[TokenEvent]] = {}
    loop = EngineLoop(
        scheduler,
        lambda e: events.setdefault(e.request_id, []).append(e),
        max_queue=100,
        max_context=blocks * per,
    )
    machine = Machine(per)
    requests, cancelled = {}, set()
    for number in range(25):
        prompt = tuple(rng.randint(2, 99) for _ in range(rng.randint(1, 20)))
        emitted = tuple(rng.randint(2, 99) for _ in range(rng.choice([0, 0, 3])))
        tokens = rng.randint(len(emitted) + 1, blocks * per - 20)
        stops = tuple(rng.sample(range(2, 1002), 30))
        requests[str(number)] = Request(
            str(number), prompt, tokens, Sampling(0), stops, False, emitted
        )
    waiting = list(requests.values())
    while waiting or loop.busy:
        if waiting and rng.random() < 0.5:
            loop.submit(waiting.pop())
        if rng.random() < 0.03:
            victim = rng.choice(list(requests))
            cancelled.add(victim)
            loop.cancel(victim)
        plan = loop.plan(rng.randint(1, 3))
        if plan is None:
            continue
        assert plan.step.tokens <= scheduler.step_tokens
        drawn = machine.run(plan.step)
        if rng.random() < 0.1:
            continue  # the step was lost; the next plan must do it again
        loop.finish(plan, drawn)
    for name, request in requests.items():
        got = events.get(name, [])
        tokens = [e.token for e in got if e.token >= 0]
        if name in cancelled:
            assert tokens == truth(request)[: len(tokens)]
            continue
        assert tokens == truth(request)
        assert [e.index for e in got] == list(
            range(len(request.emitted), len(request.emitted) + len(got))
        )
        assert [e.finish is not None for e in got] == [False] * (len(got) - 1) + [True]
    assert scheduler.blocks.free == scheduler.blocks.size
    assert scheduler.slots.free == scheduler.slots.size
    assert loop.load == 0


def test_decodes_come_before_prefill_and_the_budget_holds() -> None:
    scheduler = Scheduler(4, 64, 8, 10)
    out: list[TokenEvent] = []
    loop = EngineLoop(scheduler, out.append, max_queue=9, max_context=256)
    machine = Machine(8)
    loop.submit(Request("a", (5,), 9))
    plan = loop.plan(1)
    assert plan is not None
    loop.finish(plan, machine.run(plan.step))
    loop.submit(Request("b", tuple(range(2, 40)), 9))
    plan = loop.plan(1)
    assert plan is not None
    sizes = [len(p.ids) for m in plan.step.micro_batches for p in m.parts]
    assert sizes == [1, 9]


def test_refusals_say_what_to_change() -> None:
    loop = EngineLoop(Scheduler(1, 4, 8, 8), lambda e: None, max_queue=2, max_context=100)
    with pytest.raises(RequestError, match=r"20 prompt tokens \+ max_tokens 20 = 40 exceed .* 32"):
        loop.submit(Request("a", (2,) * 20, 20))
    loop.submit(Request("b", (2,), 3))
    loop.submit(Request("c", (2,), 3))
    with pytest.raises(Overloaded, match="the limit is 2"):
        loop.submit(Request("d", (2,), 3))
    assert loop.load == 2


def test_abort_all_ends_every_request() -> None:
    out: list[TokenEvent] = []
    loop = EngineLoop(Scheduler(1, 8, 8, 8), out.append, max_queue=9, max_context=64)
    for name in "abc":
        loop.submit(Request(name, (2, 3), 3))
    loop.plan(1)
    loop.abort_all("going away")
    assert sorted((e.request_id, e.finish, e.error) for e in out) == [
        (n, "error", "going away") for n in "abc"
    ]
    assert not loop.busy


def test_pool_gives_all_or_nothing() -> None:
    scheduler = Scheduler(1, 2, 8, 8)
    with pytest.raises(OutOfBlocks, match="3 KV blocks wanted, 2 free"):
        scheduler.blocks.take(3)
    assert scheduler.blocks.free == 2


def test_steps_survive_bytes_and_split_evenly() -> None:
    parts = [
        Part(
            i,
            7 * i,
            tuple(range(n)),
            (i, 9),
            (Sampling(0.5, 0.9, 3, 1 << 62), 4) if i % 2 else None,
        )
        for i, n in enumerate((1, 30, 1, 28, 2))
    ]
    for count in (1, 2, 3, 9):
        step = split(parts, count)
        assert Step.from_bytes(step.to_bytes()) == step
        assert sorted(p.slot for m in step.micro_batches for p in m.parts) == [0, 1, 2, 3, 4]
        for m in step.micro_batches:
            lengths = [len(p.ids) > 1 for p in m.parts]
            assert lengths == sorted(lengths)
    loads = [m.tokens for m in split(parts, 2).micro_batches]
    assert max(loads) - min(loads) <= 2
