"""Decode steps as a member runs them: planned, launched, drawn, and their tokens taken in.

Prompts are not computed: rings and pools hold what they hold, which costs a step the same.
"""

from __future__ import annotations

import statistics
import time

import torch

from whalepod.engine.ahead import Ahead
from whalepod.engine.attention import AttentionStage
from whalepod.engine.experts import LocalExperts
from whalepod.engine.graph import DecodeGraphs
from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.sampler import Drawn
from whalepod.engine.scheduler import Scheduler

_WARM, _STEPS = 6, 24


def step_seconds(
    stage: AttentionStage, graphs: DecodeGraphs, experts: LocalExperts, batch: int, context: int
) -> tuple[float, float]:
    """Median seconds of a step of `batch` sequences behind `context` tokens each.

    Tokens are drawn at temperature 1: those of random weights would soon be alike if the best was taken.

    Returns:
        launched while the one before is under way, as a member does it; and one after the other.
    """
    stage.graphs = graphs
    found = []
    for ahead in (True, False):
        loop = _decoding(stage, batch, context)
        if not ahead:
            loop.foresee = lambda _: None  # type: ignore[method-assign]
        steps, times = Ahead(loop, stage), []
        for _ in range(_WARM + _STEPS):
            start = time.perf_counter()
            plan = steps.plan or loop.plan(1)
            assert plan is not None
            steps.step(experts, plan)
            times.append(time.perf_counter() - start)
        if stage.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(statistics.median(times[_WARM:]))
    return found[0], found[1]


def _decoding(stage: AttentionStage, batch: int, context: int) -> EngineLoop:
    """A loop whose sequences have their prompts behind them."""
    cache, events = stage.cache, list[TokenEvent]()
    scheduler = Scheduler(batch, cache.blocks, cache.block_tokens, batch * context)  # all at once
    loop = EngineLoop(scheduler, events.append, max_queue=batch, max_context=1 << 20,
                      max_queue_tokens=1 << 30)  # fmt: skip
    ids = torch.randint(stage.config.vocab_size, (batch, context)).tolist()
    for i in range(batch):
        sampling = Sampling(1.0, seed=i)
        loop.submit(Request(f"r{i}", tuple(ids[i]), _WARM + _STEPS + 3, sampling, ignore_eos=True))
    plan = loop.plan(1)
    assert plan is not None
    loop.finish(plan, [Drawn(ids[i][-1], -1.0) for i in range(batch)])
    assert [s.pending for s in scheduler.running] == [1] * batch
    return loop
