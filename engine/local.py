"""Whole layouts in one process: members on threads, joined by a local fabric.

`single` needs neither threads nor fabric. The classes are those that Ray actors run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.local_fabric import LocalFabric, local_fabrics
from whalepod.cluster.placement import Placement
from whalepod.cluster.topology import seats_for
from whalepod.config import Config
from whalepod.engine.ahead import Ahead
from whalepod.engine.experts import LocalExperts
from whalepod.engine.member import Member
from whalepod.engine.request import Request, TokenEvent
from whalepod.engine.source import Source
from whalepod.errors import EpochLost, WhalepodError


class SingleEngine:
    """Layout `single`: one member with all roles; call `step` until `loop.busy` is False."""

    def __init__(self, config: Config, source: Source) -> None:
        self.events: list[TokenEvent] = []
        self.member = Member("all", config, source, self.events.append)
        layers = source.config.layers
        self.member.open_attention(layers)
        gates = {layer: source.gate(layer) for layer in layers}
        table = {layer: source.experts(layer) for layer in layers}
        self._experts = LocalExperts(gates, table)
        assert self.member.loop is not None
        self.loop = self.member.loop
        assert self.member.stage is not None
        self.ahead = Ahead(self.loop, self.member.stage)

    def step(self) -> bool:
        """Run one step; False when there was nothing to do."""
        plan = self.ahead.plan or self.loop.plan(1)
        if plan is None:
            return False
        self.ahead.step(self._experts, plan)
        return True

    def run(self, requests: Seq[Request]) -> Iterator[TokenEvent]:
        """Submit all requests and yield events until every one has ended."""
        for request in requests:
            self.loop.submit(request)
        while self.loop.busy or self.loop.held:
            if not self.step() and self.loop.held:
                self.loop.wake.wait(1)
                self.loop.wake.clear()
            yield from self.events
            self.events.clear()

    def close(self) -> None:
        """Nothing to give back."""


class ThreadedEngine:
    """Layouts `ep` and `afd` on threads: one epoch, one thread a member.

    `replicas` places that many further copies of every expert.
    """

    def __init__(self, config: Config, source: Source, *, replicas: int = 0) -> None:
        self.events: queue.Queue[TokenEvent | WhalepodError] = queue.Queue()
        seats = seats_for(config.topology)
        shards = tuple(s.name for s in seats if "expert" in s.roles)
        model = source.config
        placement = Placement.balanced(
            model.num_hidden_layers, model.n_routed_experts, shards, replicas
        )
        self.epoch = Epoch(
            id=1,
            members=seats,
            placement=placement,
            router=config.topology.router if config.topology.layout == "afd" else "attention",
            config_digest=config.digest,
        )
        self.members = [Member(s.name, config, source, self.events.put) for s in seats]
        for member in self.members:
            member.prepare(self.epoch)
        self.firsts = [m for m in self.members if m.loop is not None]
        self._stop = threading.Event()
        deadline = config.cluster.step_deadline_s
        self.fabrics = local_fabrics([s.name for s in seats], epoch=1, deadline_s=deadline)
        lead = self.firsts[0].loop
        assert lead is not None
        for member in self.firsts:
            assert member.loop is not None
            member.loop.ring = lead.wake.set
        self._threads = [
            threading.Thread(target=self._serve, args=(m, f), name=m.name, daemon=True)
            for m, f in zip(self.members, self.fabrics, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, requests: Seq[Request]) -> Iterator[TokenEvent]:
        """Spread requests over the attention members and yield events until all have ended.

        Raises:
            EpochLost: a member's thread failed; there is no next epoch here.
        """
        for i, request in enumerate(requests):
            loop = self.firsts[i % len(self.firsts)].loop
            assert loop is not None
            loop.submit(request)
        left = len(requests)
        while left:
            event = self.events.get(timeout=self.epoch_deadline_s)
            if isinstance(event, WhalepodError):
                raise event
            left -= event.finish is not None
            yield event

    epoch_deadline_s = 300.0

    def close(self) -> None:
        """Stop at a step boundary and join every thread."""
        self._stop.set()
        lead = self.firsts[0].loop
        assert lead is not None
        lead.wake.set()
        for thread in self._threads:
            thread.join(10)
        for fabric in self.fabrics:
            fabric.close()

    def _serve(self, member: Member, fabric: LocalFabric) -> None:
        try:
            with torch.inference_mode():
                member.serve(self.epoch, fabric, self._stop)
        except EpochLost as error:
            self.events.put(error)
        except Exception as error:
            failure = WhalepodError(f"member {member.name} failed: {error!r}")
            failure.__cause__ = error
            self.events.put(failure)
        finally:
            fabric.close()


def open_engine(config: Config, source: Source) -> SingleEngine | ThreadedEngine:
    """Build the configured layout in this process."""
    if config.topology.layout == "single":
        return SingleEngine(config, source)
    return ThreadedEngine(config, source)
