"""What an attention stage sees of the experts: rows go out, summed rows come back.

Legend: T rows, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.engine.expert import ExpertShard, home_room
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import (
    TAG_HOME,
    TAG_ROUTER,
    TAG_SHARD,
    Place,
    to_home,
    to_router,
)
from whalepod.engine.mail import Letter, Mail
from whalepod.engine.router import Router
from whalepod.errors import EpochLost
from whalepod.kernels.beside import Beside
from whalepod.kernels.combine import combine
from whalepod.model.gate import Gate
from whalepod.model.moe import Table, mixture
from whalepod.model.shape import ModelConfig
from whalepod.model.stack import ExpertStack


class Experts(Protocol):
    """The routed experts of one step. `send` and `receive` come in the same order."""

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Let rows go; T may be 0 when only other members have rows in this pass."""
        ...

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """Wait for the sums of the rows sent, `[T, D]` fp32; or `[T, K, D]`, yet to be added up in order.

        Raises EpochLost.
        """
        ...


class LocalExperts:
    """All experts in this process."""

    def __init__(self, gates: dict[int, Gate], experts: Mapping[int, Table]) -> None:
        self._gates, self._experts = gates, experts
        self._done: dict[tuple[int, int], tuple[Beside, Tensor]] = {}

    @property
    def places(self) -> tuple[int, ...]:
        """Changes when weights have been put elsewhere in memory."""
        stacks = (t for t in self._experts.values() if isinstance(t, ExpertStack))
        return tuple(n for stack in stacks for n in (id(stack), stack.moves))

    @property
    def key(self) -> tuple[int, ...]:
        """Nothing besides."""
        return ()

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Compute at once; a graph may run what follows beside it."""
        with Beside(x_TD.device) as branch:
            routes = self._gates[layer].route(x_TD, ids_T)
            made = mixture(x_TD, routes, self._experts[layer])
        self._done[layer, micro_batch] = branch, made

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """Return what `send` computed."""
        branch, made = self._done.pop((layer, micro_batch))
        branch.join()
        return made

    def settle(self) -> None:
        """Nothing is under way."""


class RemoteExperts:
    """Experts on other members (and, in layout ep, on this one too), for one step.

    Args:
        replica: this attention replica's number.
        router: set when this member routes for itself.
        shard: set when this member holds experts as well; it then serves every pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        fabric: Fabric,
        lanes: Lanes,
        announced: dict[int, Announcement],
        replica: int,
        dtype: torch.dtype,
        router: Router | None = None,
        shard: ExpertShard | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config, self._fabric, self._lanes = config, fabric, lanes
        self._announced, self._replica = announced, replica
        self._router, self._shard, self._device = router, shard, torch.device(device)
        self._mail = Mail(fabric, self._device)
        self._leg1, self._leg3 = (
            to_router(config.hidden_size, dtype),
            to_home(config.hidden_size, dtype),
        )
        self._waiting: dict[tuple[int, int], tuple[int, list[Letter]]] = {}
        self._serving: dict[tuple[int, int], list[Letter]] = {}

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Leg 1 (or 2, when this member routes), and ask for leg 3."""
        place = Place(self._lanes.epoch, layer, micro_batch)
        count, key, mail = x_TD.shape[0], (layer, micro_batch), self._mail
        if self._shard is not None:
            rows = self._rows(micro_batch)
            self._serving[key] = self._shard.ask(mail, self._lanes, place, rows)
        room = home_room(self._leg3, count, self._config)
        asked = [mail.ask(TAG_HOME, place, rank, room) for rank in self._lanes.shards if count]
        self._waiting[key] = (count, asked)
        if count and self._router is not None:
            homes = [(self._fabric.rank, count)]
            self._router.dispatch(mail, self._lanes, place, x_TD, ids_T, homes)
        elif count:
            message = self._leg1.pack(place, ids_T.unsqueeze(1), x_TD)
            to = self._lanes.dispatcher(layer, self._replica)
            mail.send(TAG_ROUTER, place, message, to, message.numel())
            mail.post(TAG_ROUTER, place)
        mail.post(TAG_SHARD, place)

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """Leg 3: one row per (token, expert) from the shards, summed in the router's order."""
        place, key = Place(self._lanes.epoch, layer, micro_batch), (layer, micro_batch)
        if self._shard is not None:
            asked = self._serving.pop(key)
            self._shard.serve_pass(self._mail, self._lanes, place, self._rows(micro_batch), asked)
        self._mail.post(TAG_HOME, place)
        count, incoming = self._waiting.pop(key)
        width, k = self._config.hidden_size, self._config.num_experts_per_tok
        parcels = [self._leg3.unpack(place, letter.take()) for letter in incoming]
        self._mail.check()
        if not parcels:
            return torch.zeros(0, width, device=self._device)
        ints = torch.cat([i for i, _ in parcels]).long()
        if len(ints) != count * k:
            raise EpochLost(
                place.epoch, [], f"{len(ints)} expert rows came back in {place}, not {count * k}"
            )
        rows_ND = torch.cat([r for _, r in parcels])
        parts = torch.empty(count * k, width, dtype=rows_ND.dtype, device=self._device)
        parts[ints[:, 0] * k + ints[:, 1]] = rows_ND
        return combine(parts.view(count, k, width))

    def settle(self) -> None:
        """Wait until everything sent has left; the end of a step."""
        self._mail.settle()

    def _rows(self, micro_batch: int) -> list[int]:
        return [self._announced[r].rows[micro_batch] for r in self._lanes.replicas]
