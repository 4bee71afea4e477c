"""Time what the host does for a decode step: planning, inputs of graphs, taking tokens in.

    PYTHONPATH=src:. python bench/host_step.py [--batch 64 256] [--context 1024] [--steps 300]

There is no model: every draw is the same token. While the host does this the device of a member has nothing
to do, so it is added to every step, but where steps are launched ahead (`engine/ahead.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from bench.machine import heading

from whalepod.engine.graph import GraphInputs, rows_of, width_of
from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.sampler import Drawn, settings_row
from whalepod.engine.scheduler import Scheduler

BLOCK = 128


def line(batch: int, context: int, steps: int, snapshots: int) -> str:
    """A row of the table."""
    blocks = batch * (-(-(context + steps) // BLOCK) + 1)
    scheduler = Scheduler(batch, blocks, BLOCK, 8192, range(batch, batch + snapshots))
    events: list[TokenEvent] = []
    loop = EngineLoop(scheduler, events.append, max_queue=batch, max_context=1 << 20,
                      max_queue_tokens=1 << 30)  # fmt: skip
    for i in range(batch):
        prompt = tuple(range(i * context, i * context + context))
        loop.submit(Request(f"r{i}", prompt, steps, Sampling(0.0), ignore_eos=True))
    times: list[tuple[float, float, float, float]] = []
    inputs: dict[tuple[int, int], GraphInputs] = {}
    while loop.busy:
        start = time.perf_counter()
        plan = loop.plan(1)
        assert plan is not None
        (micro_batch,) = plan.step.micro_batches
        planned = put = time.perf_counter()
        if all(len(part.ids) == 1 for part in micro_batch.parts):
            parts = micro_batch.parts
            size = rows_of(len(parts)) or len(parts), width_of(max(len(p.blocks) for p in parts))
            if size not in inputs:
                inputs[size] = GraphInputs(*size, torch.device("cpu"))
            inputs[size].put(parts)
            put = time.perf_counter()
        draws = micro_batch.draws()
        torch.tensor([settings_row(*draw) for draw in draws] or [0.0], dtype=torch.float64)
        micro_batch.histories()
        drawn = time.perf_counter()
        loop.finish(plan, [Drawn(5, -1.0) for _ in draws])
        end = time.perf_counter()
        if len(draws) == batch:
            times.append((planned - start, put - planned, drawn - put, end - drawn))
    assert len(events) == batch * steps
    parts_us = [statistics.median(t) * 1e6 for t in zip(*times, strict=True)]
    total = sum(parts_us)
    told = " | ".join(f"{us:,.0f}" for us in parts_us)
    return f"| {batch} | {snapshots} | {told} | {total:,.0f} | {total / batch:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    print(heading(" ".join(["python", *sys.argv])) + "\n")
    print(
        "| requests | prefix snapshots | plan us | inputs | settings of draws | take tokens in | "
        "sum | a request |\n|---|---|---|---|---|---|---|---|"
    )
    for batch in args.batch:
        for snapshots in (0, 32):
            print(line(batch, args.context, args.steps, snapshots), flush=True)


if __name__ == "__main__":
    main()
