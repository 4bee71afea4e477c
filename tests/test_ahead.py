"""Steps that are launched before the last one's tokens are known: the same tokens, whatever happens meanwhile.

Graphs are not captured here; what is tested is who is planned, and what becomes of those that end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fixed import Uncaptured

from whalepod.cluster.local_fabric import local_fabrics
from whalepod.config import Config
from whalepod.engine.local import SingleEngine, ThreadedEngine
from whalepod.engine.request import Adjust, Request, Sampling, TokenEvent
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow
Between = Callable[[SingleEngine, int], None]
Output = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("whalepod.engine.member.DecodeGraphs", Uncaptured)
    monkeypatch.setattr("whalepod.engine.member.warm_stage", lambda *_: None)
    with torch.inference_mode():
        yield


def settings(tiny: Path, **engine: Any) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"layout": "single"},
            "engine": {"max_step_tokens": 192, "max_batch": 4, **engine},
        }
    )


def opened(tiny: Path, ahead: bool = True, **engine: Any) -> SingleEngine:
    config = settings(tiny, **engine)
    found = SingleEngine(config, Source(config.model, Checkpoint.open(tiny), packed=True))
    if not ahead:
        found.loop.foresee = lambda _: None  # type: ignore[method-assign]
    return found


def drive(
    engine: SingleEngine, todo: list[Request], between: Between = lambda *_: None
) -> list[TokenEvent]:
    """All events; `between` is called after each step with its number."""
    for request in todo:
        engine.loop.submit(request)
    steps = 0
    while engine.loop.busy or engine.ahead.plan:
        assert engine.step()
        steps += 1
        between(engine, steps)
        assert steps < 500
    assert engine.loop.scheduler.slots.free == engine.loop.scheduler.slots.size
    return engine.events


def output(events: list[TokenEvent]) -> Output:
    found: Output = {}
    for event in events:
        found.setdefault(event.request_id, []).append((event.token, event.logprob))
    return found


def prompts(*lengths: int, tokens: int = 12) -> list[Request]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 900, (length,), generator=generator).tolist()
        sampling = Sampling(0.8, 0.9, 40, seed=i) if i % 2 else Sampling(0.0)
        made.append(Request(f"r{i}", tuple(ids), tokens + 2 * i, sampling, ignore_eos=True))
    return made


def test_the_same_tokens_as_one_step_after_the_other(tiny: Path) -> None:
    todo = prompts(3, 140, 17, 126, 9, 60)  # more than run at once
    plain, engine = opened(tiny, ahead=False), opened(tiny)
    assert output(drive(engine, todo)) == output(drive(plain, todo))
    counters = engine.loop.counters
    assert plain.loop.counters.foreseen == 0
    assert counters.foreseen > counters.steps / 2
    assert counters.generated == plain.loop.counters.generated
    assert counters.tokens == plain.loop.counters.tokens


def test_who_stops_is_left_out_of_the_step_that_was_launched_already(tiny: Path) -> None:
    todo = prompts(3, 40, 17)
    whole = output(drive(opened(tiny, ahead=False), todo))
    stop = whole["r0"][6][0]
    todo[0] = replace(todo[0], stop_ids=(stop,), ignore_eos=False)
    engine, plain = opened(tiny), opened(tiny, ahead=False)
    got = output(drive(engine, todo))
    assert got == output(drive(plain, todo))
    first = [token for token, _ in whole["r0"]].index(stop)
    assert got == {**whole, "r0": whole["r0"][: first + 1]}
    assert engine.loop.counters.generated == sum(map(len, got.values()))
    assert engine.loop.counters.tokens == plain.loop.counters.tokens
    assert engine.loop.counters.foreseen


def test_somebody_comes_and_somebody_goes(tiny: Path) -> None:
    todo = prompts(3, 40, 17, 130, tokens=18)
    alone = output(drive(opened(tiny, ahead=False), todo))
    began: list[int] = []

    def between(engine: SingleEngine, step: int) -> None:
        if step == 8:
            engine.loop.submit(todo[3])
            engine.loop.cancel("r1")
        if not began and any(e.request_id == "r3" for e in engine.events):
            began.append(step)

    events = drive(opened(tiny), todo[:3], between)
    got = output(events)
    assert began[0] <= 8 + 1 + 2, "one step was under way, and the prompt fits into one more"
    assert [e.finish for e in events if e.request_id == "r1"][-1] == "abort"
    for name in ("r0", "r2", "r3"):
        assert got[name] == alone[name]
    assert got["r1"][:-1] == alone["r1"][: len(got["r1"]) - 1]


def test_deadlines_are_kept(tiny: Path) -> None:
    todo = prompts(3, 40, tokens=40)
    todo[0] = replace(todo[0], timeout_s=0.25)
    events = drive(opened(tiny), todo, lambda *_: time.sleep(0.01))
    assert [e.finish for e in events if e.request_id == "r0"][-1] == "deadline"
    assert [e.finish for e in events if e.request_id == "r1"][-1] == "length"


def test_few_blocks_are_not_taken_from_anybody_for_it(tiny: Path) -> None:
    todo = prompts(120, 110, 115, tokens=20)
    few, many = opened(tiny, kv_tokens=512), opened(tiny, ahead=False)
    assert output(drive(few, todo)) == output(drive(many, todo))
    assert few.loop.scheduler.preemptions
    assert few.loop.counters.foreseen


def test_snapshots_at_the_borders_of_blocks(tiny: Path) -> None:
    todo = prompts(120, 100, tokens=30)
    engine = opened(tiny)
    first = output(drive(engine, todo))
    engine.events.clear()
    going_on = [
        Request(f"g{i}", (*r.prompt_ids, *(t for t, _ in first[r.id])), 6, r.sampling)
        for i, r in enumerate(todo)
    ]
    events = drive(engine, going_on)
    assert all(e.cached == 128 for e in events), "what was decoded is known, up to a block's border"
    assert output(events) == output(drive(opened(tiny, ahead=False), going_on))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.0, adjust=Adjust(presence=0.5)), Sampling(0.0, alternatives=2)],
)
def test_draws_that_need_the_host_wait_for_it(tiny: Path, sampling: Sampling) -> None:
    todo = [replace(r, sampling=sampling) for r in prompts(3, 17)]
    engine = opened(tiny)
    assert output(drive(engine, todo)) == output(drive(opened(tiny, ahead=False), todo))
    assert not engine.loop.counters.foreseen


def test_what_is_dropped_is_drawn_again_alike(tiny: Path) -> None:
    todo = prompts(3, 120, 17)

    def between(engine: SingleEngine, step: int) -> None:
        if step % 3 == 0:
            engine.ahead.drop()

    want = output(drive(opened(tiny, ahead=False), todo))
    assert output(drive(opened(tiny), todo, between)) == want


def test_an_epoch_ends_while_a_step_is_under_way(tiny: Path) -> None:
    todo = prompts(3, 40, 17, tokens=24)
    want = output(drive(opened(tiny, ahead=False), todo))
    config = settings(tiny)
    engine = ThreadedEngine(config, Source(config.model, Checkpoint.open(tiny), packed=True))
    (member,) = engine.members
    assert member.loop is not None
    for request in todo:
        member.loop.submit(request)
    events = [engine.events.get(timeout=60) for _ in range(20)]
    engine.close()
    assert member.loop.counters.foreseen
    assert member.loop.busy, "it ended before all was done"

    stop, epoch = threading.Event(), replace(engine.epoch, id=2)
    (fabric,) = local_fabrics([member.name], epoch=2, deadline_s=30.0)

    def serve() -> None:
        with torch.inference_mode():
            member.serve(epoch, fabric, stop)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    while len(events) < sum(map(len, want.values())):
        events.append(engine.events.get(timeout=60))
    stop.set()
    thread.join(30)
    fabric.close()
    assert not member.loop.busy
    assert output([e for e in events if isinstance(e, TokenEvent)]) == want
