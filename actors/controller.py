"""The controller actor: membership and epochs for one cluster, under one name.

Ray restarts it when it dies; members then join again and tell it the epoch they are in, so it needs
no storage of its own. The data plane goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.membership import Membership
from whalepod.cluster.rendezvous import Rendezvous
from whalepod.cluster.report import Order
from whalepod.cluster.topology import MemberInfo
from whalepod.config import Config
from whalepod.model.shape import ModelConfig

NAMESPACE = "whalepod"
PROBE_S, EMPTY_S = 1.5, 60.0


def controller_name(config: Config) -> str:
    """One controller per configuration, so that a changed one is rolled out beside the old."""
    return f"controller-{config.digest}"


async def alive(handle: ActorHandle) -> bool:
    """Whether an actor answers; one that is silent for too long is ended, so Serve replaces it."""
    try:
        await asyncio.wait_for(handle.__ray_ready__.remote(), PROBE_S)
    except ray.exceptions.RayActorError:
        return False
    except TimeoutError:
        ray.kill(handle, no_restart=False)
        return False
    return True


class Controller:
    """Ray's side of `Membership`; every method returns at once or waits without blocking."""

    def __init__(self, config: dict[str, Any], model: dict[str, Any]) -> None:
        parsed, sizes = Config.from_dict(config), ModelConfig.from_dict(model)
        host = str(ray.util.get_node_ip_address())
        self._rendezvous = Rendezvous(host)
        self._membership = Membership(
            parsed,
            sizes.num_hidden_layers,
            sizes.n_routed_experts,
            alive,
            self._rendezvous.address,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def join(
        self, info: MemberInfo, handle: list[ActorHandle], digest: str, epoch: dict[str, Any] | None
    ) -> None:
        """See `Membership.join`."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._membership.run()),
                asyncio.create_task(self._membership.watch()),
                asyncio.create_task(self._end_when_empty()),
            ]
        self._membership.join(info, handle[0], digest, epoch)

    async def _end_when_empty(self) -> None:
        """End for good once nobody is in for a while: the application is gone."""
        empty_s = 0.0
        while empty_s < EMPTY_S:
            await asyncio.sleep(5)
            empty_s = 0.0 if self._membership.members else empty_s + 5
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def next_order(self, name: str, seen: int) -> Order | None:
        """See `Membership.next_order`."""
        return await self._membership.next_order(name, seen)

    async def prepared(self, name: str, epoch: int) -> None:
        """See `Membership.prepared`."""
        self._membership.prepared(name, epoch)

    async def entered(self, name: str, epoch: int) -> None:
        """See `Membership.entered`."""
        self._membership.entered(name, epoch)

    async def report_lost(self, name: str, epoch: int, detail: str) -> None:
        """See `Membership.report_lost`."""
        self._membership.report_lost(name, epoch, detail)

    async def leave(self, name: str) -> None:
        """See `Membership.leave`."""
        await self._membership.leave(name)

    async def status(self) -> dict[str, Any]:
        """See `Membership.status`."""
        return self._membership.status()

    async def epoch(self) -> dict[str, Any] | None:
        """The epoch that serves, for tools."""
        epoch: Epoch | None = self._membership.epoch
        return epoch.to_dict() if epoch else None


def get_controller(config: Config, model: ModelConfig) -> ActorHandle:
    """The cluster's controller; started by whoever asks first."""
    actor = ray.remote(Controller)
    handle: ActorHandle = actor.options(
        name=controller_name(config),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1000,
        num_cpus=0,
        label_selector=config.cluster.label_selector.get("controller", {}),
    ).remote(config.model_dump(mode="json"), model.model_dump(mode="json"))
    return handle


def find_controller(config: Config) -> ActorHandle | None:
    """The controller of this configuration if one runs."""
    try:
        return ray.get_actor(controller_name(config), namespace=NAMESPACE)
    except ValueError:
        return None
