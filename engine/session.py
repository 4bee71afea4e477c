"""One member's part in one epoch: steps until the epoch stops or is lost.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.config import Topology
from whalepod.engine.ahead import Ahead
from whalepod.engine.announce import Announcer
from whalepod.engine.attention import AttentionStage
from whalepod.engine.expert import ExpertShard
from whalepod.engine.experts import LocalExperts, RemoteExperts
from whalepod.engine.fixed import Crowded, FixedLegs, fixed_sizes
from whalepod.engine.fixed_passes import FixedExperts, serve_router_fixed, serve_shard_fixed
from whalepod.engine.graph import Captures, DecodeGraphs
from whalepod.engine.handover import (
    outcome_bytes,
    pack_outcome,
    pass_on,
    take_over,
    unpack_outcome,
)
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import (
    TAG_TOKENS,
    Incoming,
    Outgoing,
)
from whalepod.engine.loop import EngineLoop
from whalepod.engine.outcome import outcome
from whalepod.engine.passes import keep, restore, run_fixed, settle
from whalepod.engine.plan import Plan
from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.router import Router
from whalepod.engine.sampler import Drawn
from whalepod.engine.step import Step
from whalepod.model.batch import Batch

log = logging.getLogger(__name__)
_WIDE_STEPS = 256
# Rows from which splitting a step pays. Experts of a GPU take the time that reading their weights takes, once
# for each part, up to about a thousand rows.
_LEAST_ROWS_CPU, _LEAST_ROWS_GPU = 16, 1024


@dataclass(slots=True)
class Seat:
    """Where an attention member sits, and what else it carries in this epoch."""

    fabric: Fabric
    lanes: Lanes
    stage_index: int
    replica: int
    router: Router | None
    shard: ExpertShard | None

    fixed: FixedLegs | None = None

    def rank_of_stage(self, stage: int) -> int:
        """The rank of this replica's given stage."""
        return self.lanes.homes[stage][self.replica]

    def experts(
        self, stage: AttentionStage, announced: dict[int, Announcement]
    ) -> LocalExperts | RemoteExperts:
        """The experts of one step; a member that is alone needs no legs."""
        if self.fabric.size == 1:
            assert self.router is not None
            assert self.shard is not None
            return LocalExperts(self.router.gates, self.shard.experts)
        return RemoteExperts(
            stage.config,
            self.fabric,
            self.lanes,
            announced,
            self.replica,
            stage.dtype,
            self.router,
            self.shard,
            stage.device,
        )


def _pad(items: list[Batch], announced: dict[int, Announcement]) -> list[Batch | None]:
    """As many micro-batches as the busiest replica has."""
    most = max((m + 1 for a in announced.values() for m in range(3) if a.rows[m]), default=0)
    return [*items, *([None] * (most - len(items)))]


class FirstStage:
    """An attention member that owns requests: plans steps, runs its layers, emits tokens."""

    keepalive_s = 1.0

    def __init__(self, loop: EngineLoop, stage: AttentionStage, topology: Topology) -> None:
        self.loop, self.stage, self.topology = loop, stage, topology
        least = _LEAST_ROWS_GPU if stage.device.type == "cuda" else _LEAST_ROWS_CPU
        self._least_rows = topology.micro_batch_rows or least
        self._wide = 0  # steps in which shards shall have room for every output
        self._ahead = Ahead(loop, stage)

    def serve(self, seat: Seat, stop: threading.Event) -> None:
        """Run steps; returns when the lead has announced the stop. Raises EpochLost."""
        announcer = Announcer(seat.fabric, seat.lanes)
        leads = seat.fabric.rank == seat.lanes.lead
        others_busy, plan = False, None
        self._wide = 0
        self._ahead.drop()  # of an epoch that was broken off

        def mine() -> Announcement:
            nonlocal plan
            if leads and stop.is_set():
                return Announcement(stop=True)
            # Alone, there is nothing to wait for that another batch could fill.
            most = 1 if seat.fabric.size == 1 else self.topology.micro_batches
            plan = self._ahead.plan or self.loop.plan(most, self._least_rows)
            return _announce(plan, seat.fixed is not None, self._wide > 0)

        while True:
            plan = None
            under_way = self._ahead.plan is not None
            if leads and not (others_busy or under_way or self.loop.busy or stop.is_set()):
                self.loop.wake.wait(self.keepalive_s)
            self.loop.wake.clear()
            announced = announcer.exchange(mine)
            if announced is None:
                return
            others_busy = any(
                any(a.rows) for replica, a in announced.items() if replica != seat.replica
            )
            if seat.fixed is not None and (sizes := fixed_sizes(announced)) is not None:
                self._fixed_step(seat, FixedExperts(seat.fixed, sizes), plan, announcer.step)
            else:
                self._step(seat, announced, plan)

    def _fixed_step(self, seat: Seat, experts: FixedExperts, plan: Plan | None, step: int) -> None:
        if plan is not None or seat.shard is not None:
            self._wide = max(0, self._wide - 1)
            try:
                made = run_fixed(self.stage, experts, plan, step)
            except Crowded:
                log.info(
                    "a shard had more outputs than room: room for all in %d steps", _WIDE_STEPS
                )
                self._wide = _WIDE_STEPS
                return  # the same tokens are planned again
            if plan is not None:
                self.loop.finish(plan, *made)

    def _step(self, seat: Seat, announced: dict[int, Announcement], plan: Plan | None) -> None:
        experts, step = seat.experts(self.stage, announced), plan.step if plan else Step(())
        if plan is not None and isinstance(experts, LocalExperts):
            self._ahead.step(experts, plan)
            return
        tokens = self.stage.cache.block_tokens
        batches = [m.batch(tokens, self.stage.device) for m in step.micro_batches]
        padded = _pad(batches, announced)
        restore(self.stage, step)
        x = [self.stage.embed(b) for b in batches]
        x += [torch.empty(0, device=self.stage.device)] * (len(padded) - len(x))
        if plan is not None or seat.shard is not None:
            x = self.stage.forward(padded, x, experts)
        if plan is not None:
            last = len(seat.lanes.stage_layers) - 1
            drawn, told = (
                outcome(self.stage, x[: len(batches)], step.micro_batches)
                if last == 0
                else self._draw_remotely(seat, step, x, seat.rank_of_stage(last))
            )
            seat.fabric.check()
            drafts = settle(self.stage, plan, batches, x, drawn)
            self.loop.finish(plan, drawn, drafts, told)
        experts.settle()

    def _draw_remotely(
        self, seat: Seat, step: Step, x: list[Tensor], last: int
    ) -> tuple[list[Drawn], list[PromptLogprobs]]:
        out = Outgoing()
        pass_on(seat.fabric, out, step, x, seat.rank_of_stage(1))
        # An answer is due even when nothing is drawn: it says that the later stages are done.
        size = outcome_bytes(step)
        host = torch.device("cpu")
        answer = Incoming(seat.fabric.control, last, TAG_TOKENS, size, host).take()
        out.settle()
        return unpack_outcome(answer, step)


class LaterStage:
    """An attention member further down the pipeline: layers without requests of its own.

    Its state follows the first stage's word: a sequence's chunk becomes visible when the next
    step starts where that chunk ended, and is dropped when the step is run again.
    """

    def __init__(self, stage: AttentionStage) -> None:
        self.stage = stage
        self._open: dict[int, tuple[int, Batch]] = {}

    def serve(self, seat: Seat) -> None:
        """Run steps until the lead has announced the stop. Raises EpochLost."""
        announcer = Announcer(seat.fabric, seat.lanes)
        while (announced := announcer.exchange(None)) is not None:
            if any(announced[seat.replica].rows):
                self._step(seat, announced)

    def _step(self, seat: Seat, announced: dict[int, Announcement]) -> None:
        fabric, stage, out = seat.fabric, self.stage, Outgoing()
        before = seat.rank_of_stage(seat.stage_index - 1)
        step, x = take_over(fabric, before, stage)
        self._settle(step)
        restore(stage, step)
        batches = [m.batch(stage.cache.block_tokens, stage.device) for m in step.micro_batches]
        experts = seat.experts(stage, announced)
        x = stage.forward(batches, x, experts)
        for micro_batch, batch in zip(step.micro_batches, batches, strict=True):
            for part in micro_batch.parts:
                # Nobody reads a snapshot before the first stage has completed the step.
                keep(stage, batch, part, len(part.ids))
                self._open[part.slot] = (part.start + len(part.ids), batch)
        if stage.head is None:
            pass_on(fabric, out, step, x, seat.rank_of_stage(seat.stage_index + 1))
        else:
            message = pack_outcome(*outcome(stage, x, step.micro_batches))
            fabric.check()
            out.send(fabric.control, message, seat.rank_of_stage(0), TAG_TOKENS, message.numel())
        experts.settle()
        out.settle()

    def _settle(self, step: Step) -> None:
        for micro_batch in step.micro_batches:
            for part in micro_batch.parts:
                end, batch = self._open.pop(part.slot, (-1, None))
                if batch is not None and end == part.start:
                    batch.commit(part.slot)


def _announce(plan: Plan | None, fixed: bool, wide: bool) -> Announcement:
    mine = plan.step.micro_batches if plan else ()
    a, b, c = (*(m.tokens for m in mine), 0, 0, 0)[:3]
    return Announcement((a, b, c), even=fixed and all(map(DecodeGraphs.takes, mine)), wide=wide)


def serve_router(
    router: Router, fabric: Fabric, lanes: Lanes, fixed: FixedLegs | None = None
) -> None:
    """Route until the lead has announced the stop. Raises EpochLost."""
    announcer, captures = Announcer(fabric, lanes), _captures(fixed)
    while (announced := announcer.exchange(None)) is not None:
        sizes = fixed_sizes(announced) if fixed is not None else None
        if fixed is None or sizes is None:
            router.serve_step(fabric, lanes, announced)
        else:
            captures.run(sizes, fixed.places, partial(serve_router_fixed, fixed, sizes))


def serve_shard(
    shard: ExpertShard, fabric: Fabric, lanes: Lanes, fixed: FixedLegs | None = None
) -> None:
    """Serve rows until the lead has announced the stop. Raises EpochLost."""
    announcer, captures = Announcer(fabric, lanes), _captures(fixed)
    while (announced := announcer.exchange(None)) is not None:
        sizes = fixed_sizes(announced) if fixed is not None else None
        if fixed is None or sizes is None:
            shard.serve_step(fabric, lanes, announced)
        else:
            captures.run(sizes, fixed.places, partial(serve_shard_fixed, fixed, sizes))


def _captures(fixed: FixedLegs | None) -> Captures[None]:
    return Captures(capture=fixed is not None and fixed.device.type == "cuda")
