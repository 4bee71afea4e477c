"""A member: one process (or thread) with one device, carrying one or more roles through epochs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.fabric import Fabric
from whalepod.config import Config
from whalepod.engine.attention import AttentionStage
from whalepod.engine.expert import ExpertShard
from whalepod.engine.fixed import FixedLegs
from whalepod.engine.graph import DecodeGraphs
from whalepod.engine.lanes import Lanes, stage_layers
from whalepod.engine.loop import EngineLoop
from whalepod.engine.memory import activation_bytes, blocks_within, kv_format, memory_table
from whalepod.engine.request import TokenEvent
from whalepod.engine.router import Router
from whalepod.engine.scheduler import Scheduler
from whalepod.engine.session import (
    FirstStage,
    LaterStage,
    Seat,
    serve_router,
    serve_shard,
)
from whalepod.engine.source import Source
from whalepod.engine.warm import warm_router, warm_shard, warm_stage
from whalepod.model.shape import ModelConfig

log = logging.getLogger(__name__)


def context_limit(config: Config, model: ModelConfig) -> int:
    """Longest prompt plus output, in tokens."""
    return config.engine.max_context or min(model.max_position_embeddings, 65536)


class Member:
    """Roles that outlive epochs: KV state, weights and queues stay while memberships change.

    Args:
        name: unique in the cluster.
        config: the whole configuration; its digest is checked at admission to an epoch.
        source: where weights come from.
        emit: takes every token of this member's requests; called from the serving thread.
    """

    def __init__(
        self, name: str, config: Config, source: Source, emit: Callable[[TokenEvent], None]
    ) -> None:
        self.name, self.config, self.source, self._emit = name, config, source, emit
        self.model: ModelConfig = source.config
        self.loop: EngineLoop | None = None
        self.stage: AttentionStage | None = None
        self.router: Router | None = None
        self.shard: ExpertShard | None = None
        self._first: FirstStage | None = None
        self._later: LaterStage | None = None
        self._on_gpu = source.device.type == "cuda"
        self._warm: set[str] = set()

    def open_attention(self, layers: range) -> None:
        """Load the attention side of `layers`, and open the queue if they start the model."""
        engine = self.config.engine
        stages = stage_layers(self.model.num_hidden_layers, self.config.topology.stages)
        blocks = blocks_within(self.config, self.model, stages, self.source.packed)
        slots = engine.max_batch + engine.prefix_snapshots
        stage = self.stage = self.source.stage(
            layers, slots=slots, blocks=blocks, format=kv_format(self.config, self.model)
        )
        size = activation_bytes(self.model, engine.max_step_tokens, stage.dtype.itemsize)
        budget = engine.memory_gib
        log.info(memory_table(self.name, stage.weight_bytes, stage.cache, size, budget))
        if DecodeGraphs.able(stage):
            stage.graphs = DecodeGraphs(stage) if engine.cuda_graphs else None
            most = engine.max_batch, engine.max_step_tokens
            alone = (
                self.config.topology.layout == "single"
            )  # its experts leave sums to the layer's end
            parts = self.model.num_experts_per_tok if alone else 0
            warm_stage(stage, *most, context_limit(self.config, self.model), parts)
        if stage.head is not None or not layers.start:
            stage.grammars = self.source.grammars()
        if layers.start:
            self._later = LaterStage(stage)
            return
        scheduler = Scheduler(
            engine.max_batch,
            blocks,
            stage.cache.block_tokens,
            engine.max_step_tokens,
            snapshots=range(engine.max_batch, slots),
        )
        self.loop = EngineLoop(
            scheduler,
            self._emit,
            max_queue=engine.max_queue,
            max_queue_tokens=engine.max_queue_tokens,
            max_context=context_limit(self.config, self.model),
            draft_tokens=engine.draft_tokens,
            grammars=stage.grammars,
        )
        if engine.draft_tokens:
            stage.drafter = self.source.drafter(stage, slots=engine.max_batch)
        self._first = FirstStage(self.loop, stage, self.config.topology)

    def prepare(self, epoch: Epoch) -> None:
        """Load what an epoch needs of this member, beside the epoch that still runs."""
        lanes = Lanes.of(epoch, self.model.num_hidden_layers)
        seat = epoch.member(self.name)
        if "attention" in seat.roles and self.stage is None:
            self.open_attention(lanes.stage_layers[seat.stage])
        if "router" in seat.roles:
            self.router = self.router or self.source.router()
            self.router.load(self._routed_layers(lanes, seat.stage, seat.roles))
            if self._on_gpu and "router" not in self._warm:
                warm_router(self.router, self.config.engine.max_step_tokens)
                self._warm.add("router")
        if "expert" in seat.roles:
            self.shard = self.shard or self.source.shard()
            self.shard.prepare(epoch.placement, self.name, self.model.layers)
            if self._on_gpu and "expert" not in self._warm:
                warm_shard(self.shard, self.config.engine.max_step_tokens)
                self._warm.add("expert")

    def serve(self, epoch: Epoch, fabric: Fabric, stop: threading.Event) -> None:
        """Run this member's part of an epoch; returns at its orderly end. Raises EpochLost.

        `stop` matters on the lead alone: it ends the epoch for all at the next step boundary.
        """
        lanes, seat = Lanes.of(epoch, self.model.num_hidden_layers), epoch.member(self.name)
        if "router" in seat.roles:
            assert self.router is not None
            layers = self._routed_layers(lanes, seat.stage, seat.roles)
            self.router.place(epoch.placement, layers)
        if "expert" in seat.roles:
            assert self.shard is not None
            self.shard.trim(epoch.placement, self.name, self.model.layers)
        if "attention" in seat.roles:
            self._serve_attention(epoch, fabric, lanes, stop)
        elif "router" in seat.roles:
            assert self.router is not None
            serve_router(self.router, fabric, lanes, self._fixed(fabric, lanes, None))
        else:
            assert self.shard is not None
            serve_shard(self.shard, fabric, lanes, self._fixed(fabric, lanes, None))
        if self._on_gpu:
            torch.cuda.synchronize(self.source.device)  # what a peer still waits for has left

    def _serve_attention(
        self, epoch: Epoch, fabric: Fabric, lanes: Lanes, stop: threading.Event
    ) -> None:
        member = epoch.member(self.name)
        seat = Seat(
            fabric,
            lanes,
            member.stage,
            member.replica,
            self.router if "router" in member.roles else None,
            self.shard if "expert" in member.roles else None,
        )
        if self.stage is not None and self.stage.graphs is not None:
            seat.fixed = self._fixed(fabric, lanes, seat)
        try:
            if self._first is not None:
                self._first.serve(seat, stop)
            else:
                assert self._later is not None
                self._later.serve(seat)
        finally:
            if seat.fixed is not None and self.stage is not None and self.stage.graphs is not None:
                # They hold on to the epoch's communicators.
                self.stage.graphs.captures.forget()

    def _fixed(self, fabric: Fabric, lanes: Lanes, seat: Seat | None) -> FixedLegs | None:
        """What steps of fixed sizes need, where the fabric carries them."""
        if not fabric.together or fabric.size == 1 or len(lanes.stage_layers) > 1:
            return None
        source = self.source
        replica, router, shard = None, self.router, self.shard
        if seat is not None:
            replica, router, shard = seat.replica, seat.router, seat.shard
        return FixedLegs(
            *(self.model, fabric, lanes, source.dtype, source.device, replica, router, shard)
        )

    def _routed_layers(self, lanes: Lanes, stage: int, roles: tuple[str, ...]) -> range:
        """Layers this member routes: its own stage's, or all as a router of its own."""
        return lanes.stage_layers[stage] if "attention" in roles else self.model.layers
