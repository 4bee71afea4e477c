"""The pools as Ray Serve deployments: a replica is a member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle

from whalepod.actors.ports import bind_to_own_address
from whalepod.actors.shell import Shell
from whalepod.cluster.topology import Pool
from whalepod.config import Config
from whalepod.engine.request import Request, TokenEvent
from whalepod.errors import Overloaded, RequestError

Refusal = tuple[str, str, Any]  # kind, message, param or seconds


def replica_name(pool: Pool) -> str:
    """A name that says which pool and which replica."""
    return f"{pool}-{serve.get_replica_context().replica_id.unique_id}"


class MemberReplica:
    """A member without requests of its own: an expert shard or a router."""

    pool: Pool = "experts"

    def __init__(self, config: dict[str, Any]) -> None:
        bind_to_own_address()
        self.shell = Shell(Config.from_dict(config), self.pool, replica_name(self.pool))

    def check_health(self) -> None:
        """Raise when Serve should replace this replica."""
        self.shell.check()

    async def __del__(self) -> None:
        """Leave the epoch before the process ends (Serve calls this once requests are done)."""
        if hasattr(self, "shell"):
            await self.shell.leave()


class ExpertsReplica(MemberReplica):
    """An expert shard."""

    pool: Pool = "experts"


class RouterReplica(MemberReplica):
    """A router of its own."""

    pool: Pool = "router"


class StageActor:
    """A later pipeline stage of an attention replica; lives and dies with it."""

    def __init__(self, config: dict[str, Any], name: str, stage: int, replica: str) -> None:
        parsed = Config.from_dict(config)
        self.shell = Shell(parsed, "attention", name, stage=stage, replica=replica)

    async def check(self) -> None:
        """Raise when this process should be replaced."""
        self.shell.check()

    async def leave(self) -> None:
        """See `Shell.leave`."""
        await self.shell.leave()


class AttentionReplica:
    """An attention replica: takes requests, streams their tokens."""

    def __init__(self, config: dict[str, Any]) -> None:
        bind_to_own_address()
        parsed = Config.from_dict(config)
        self._loop = asyncio.get_running_loop() if _has_loop() else None
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        name = replica_name("attention")
        self.stages = [
            _start_stage(parsed, config, f"{name}-{stage}", stage, name)
            for stage in range(1, parsed.topology.stages)
        ]
        self.shell = Shell(parsed, "attention", name, emit=self._emit)

    async def check_health(self) -> None:
        """Raise when Serve should replace this replica and its later stages."""
        self.shell.check()
        await asyncio.wait_for(asyncio.gather(*(s.check.remote() for s in self.stages)), 10)

    async def generate(self, request: Request) -> AsyncIterator[list[TokenEvent] | Refusal]:
        """Stream a request's tokens, as many at a time as are ready.

        A request that cannot be taken gives one `Refusal` instead. Closing the stream cancels.
        """
        self._loop = asyncio.get_running_loop()
        engine = self.shell.member.loop
        assert engine is not None
        queue = self._queues[request.id] = asyncio.Queue()
        try:
            engine.submit(request)
        except RequestError as error:
            self._queues.pop(request.id, None)
            yield ("request", str(error), error.param)
            return
        except Overloaded as error:
            self._queues.pop(request.id, None)
            yield ("overloaded", str(error), error.retry_after_s)
            return
        done = False
        try:
            while not done:
                events = [await queue.get()]
                while not queue.empty():
                    events.append(queue.get_nowait())
                done = events[-1].finish is not None
                yield events
        finally:
            self._queues.pop(request.id, None)
            if not done:
                engine.cancel(request.id)

    async def load(self) -> dict[str, int]:
        """Requests and cache of this replica."""
        engine = self.shell.member.loop
        assert engine is not None
        scheduler = engine.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": engine.load - len(scheduler.running),
            "free_blocks": scheduler.blocks.free,
            "blocks": scheduler.blocks.size,
            "epoch": self.shell.epoch_id,
        }

    async def __del__(self) -> None:
        """Leave the epoch before the process ends (Serve calls this once requests are done)."""
        if hasattr(self, "shell"):
            await asyncio.gather(self.shell.leave(), *(s.leave.remote() for s in self.stages))

    def _emit(self, event: TokenEvent) -> None:
        queue = self._queues.get(event.request_id)
        if queue is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(queue.put_nowait, event)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _start_stage(
    parsed: Config, config: dict[str, Any], name: str, stage: int, replica: str
) -> ActorHandle:
    actor = ray.remote(StageActor)
    options = {
        "num_cpus": parsed.cluster.cpus_per_member,
        "num_gpus": parsed.cluster.gpus_per_member,
        "label_selector": parsed.cluster.label_selector.get("attention", {}),
    }
    handle: ActorHandle = actor.options(max_concurrency=100, **options).remote(
        config, name, stage, replica
    )
    return handle
