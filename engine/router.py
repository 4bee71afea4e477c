"""The router: choose experts for rows, and send each row to the shards that hold them.

Legend: T rows, K experts per token, D width, S shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.cluster.placement import Placement
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import (
    TAG_ROUTER,
    TAG_SHARD,
    Form,
    Place,
    to_router,
    to_shard,
)
from whalepod.engine.mail import Letter, Mail
from whalepod.model.gate import Gate, Routes
from whalepod.model.shape import ModelConfig


class Router:
    """Gates of all layers, and the shard tables of the current placement."""

    def __init__(
        self,
        config: ModelConfig,
        gates: Callable[[int], Gate],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self._load = gates
        self.gates: dict[int, Gate] = {}
        self.holders: dict[int, Tensor] = {}  # shards of every expert, `[E, R]`
        size = config.num_hidden_layers, config.n_routed_experts
        self.routed_rows = torch.zeros(size, dtype=torch.int64, device=device)

    def load(self, layers: range) -> None:
        """Read the gates of these layers that are not here yet."""
        for layer in layers:
            if layer not in self.gates:
                self.gates[layer] = self._load(layer)

    def place(self, placement: Placement, layers: range) -> None:
        """Take a placement over."""
        self.holders = {layer: self._table(placement, layer) for layer in layers}

    def _table(self, placement: Placement, layer: int) -> Tensor:
        """Shards of every expert, `[E, R]`; those with fewer replicas than R repeat theirs."""
        held = [placement.shards_of(layer, e) for e in range(self.config.n_routed_experts)]
        width = math.lcm(*(len(at) for at in held))
        rows = [list(at) * (width // len(at)) for at in held]
        return torch.tensor(rows, dtype=torch.int64).to(self.device)

    def serve_step(self, fabric: Fabric, lanes: Lanes, announced: dict[int, Announcement]) -> None:
        """Route every pass of one step, as a member of its own."""
        mail, form = Mail(fabric, self.device), to_router(self.config.hidden_size, self.dtype)
        asked = None
        mine = [
            (place, rows)
            for place, rows in lanes.passes(announced)
            if fabric.rank in lanes.load_of(place.layer, rows)
        ]
        for i, (place, rows) in enumerate(mine):
            current = asked or self._ask(mail, fabric.rank, lanes, place, rows, form)
            asked = (
                self._ask(mail, fabric.rank, lanes, *mine[i + 1], form)
                if i + 1 < len(mine)
                else None
            )
            parcels = [(home, *form.unpack(place, inc.take())) for home, inc in current]
            x_TD = torch.cat([rows for _, _, rows in parcels])
            ids_T = torch.cat([ints[:, 0] for _, ints, _ in parcels]).long()
            homes = [(home, len(ints)) for home, ints, _ in parcels]
            self.dispatch(mail, lanes, place, x_TD, ids_T, homes)
            mail.post(TAG_SHARD, place)
        mail.settle()

    def dispatch(
        self,
        mail: Mail,
        lanes: Lanes,
        place: Place,
        x_TD: Tensor,
        ids_T: Tensor,
        homes: list[tuple[int, int]],
    ) -> None:
        """Choose experts for rows and send them on; leg 2.

        Args:
            x_TD: `[T, D]` rows of one or more homes, one home after the other.
            ids_T: `[T]` token ids.
            homes: (rank, number of rows) of each home, in row order.
        """
        routes = self.gates[place.layer].route(x_TD, ids_T)
        self.count(place.layer, routes)
        home_T = torch.cat([torch.full((n,), rank) for rank, n in homes])
        row_T = torch.cat([torch.arange(n) for _, n in homes])
        labels = torch.stack([home_T, row_T], dim=1).to(x_TD.device, torch.int32)
        k = self.config.num_experts_per_tok
        form = to_shard(self.config.hidden_size, self.dtype, k)
        shard_TK = self.choose_shards(place.layer, routes)
        experts_TK, weights_TK = routes.experts_TK.to(torch.int32), routes.weights_TK
        bits_TK = weights_TK.float().view(torch.int32)
        for shard, rank in enumerate(lanes.shards):
            here_TK = shard_TK == shard
            rows = here_TK.any(1).nonzero().squeeze(1)
            ids = torch.where(here_TK[rows], experts_TK[rows], -1)
            ints = torch.cat([labels[rows], ids, bits_TK[rows]], dim=1)
            message = form.pack(place, ints, x_TD[rows])
            mail.send(TAG_SHARD, place, message, rank, form.bytes_of(x_TD.shape[0]))

    def _ask(
        self, mail: Mail, rank: int, lanes: Lanes, place: Place, rows: list[int], form: Form
    ) -> list[tuple[int, Letter]]:
        stage = lanes.stage_of(place.layer)
        return [
            (home, mail.ask(TAG_ROUTER, place, home, form.bytes_of(rows[r])))
            for r, home in enumerate(lanes.homes[stage])
            if rows[r] and lanes.dispatcher(place.layer, r) == rank
        ]

    def choose_shards(self, layer: int, routes: Routes) -> Tensor:
        """Shard index of every choice, `[T, K]`; replicas are used in turn."""
        table_ER = self.holders[layer]
        if table_ER.shape[1] == 1:
            return table_ER[:, 0][routes.experts_TK]
        tokens, k = routes.experts_TK.shape
        turn_TK = torch.arange(tokens * k, device=table_ER.device).view(tokens, k)
        return table_ER[routes.experts_TK, turn_TK % table_ER.shape[1]]

    def count(self, layer: int, routes: Routes) -> None:
        """Add to `routed_rows`, without a word to the host."""
        flat = routes.experts_TK.flatten()
        self.routed_rows[layer].scatter_add_(0, flat, torch.ones_like(flat))
