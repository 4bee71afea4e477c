"""Every member's part in a step of fixed sizes; `fixed.py` says what that is.

Legend: S shards, C rows of a home, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.engine.fixed import FixedLegs, Leg, Sizes
from whalepod.engine.legs import TAG_HOME, TAG_ROUTER, TAG_SHARD
from whalepod.kernels.hand_back import hand_back, take_in
from whalepod.kernels.hand_out import hand_out, sum_of_shards
from whalepod.model.moe import run_held


def dispatch(
    legs: FixedLegs, layer: int, blocks: Seq[int], x_TD: Tensor, ids_T: Tensor, seals: Seq[Tensor]
) -> Tensor:
    """Choose experts; the messages for all shards, `[S * bytes]` in the order of their ranks."""
    router, form = legs.router, legs.form
    assert router is not None
    routes = router.gates[layer].route(x_TD, ids_T)
    total = sum(map(form.to_shard, blocks))
    data = torch.empty(len(legs.shard_S), total, dtype=torch.uint8, device=x_TD.device)
    at = row = 0
    for count, seal in zip(blocks, seals, strict=True):
        message, part = data[:, at : at + form.to_shard(count)], slice(row, row + count)
        x, ids, weights, mark = form.split(message, count, (count, form.k), (count, form.k))
        routed = routes.experts_TK[part], routes.weights_TK[part], router.holders[layer]
        written = x, ids, weights, mark, seal, router.routed_rows[layer]
        hand_out(x_TD[part], *routed, legs.shard_S, row, *written)
        at, row = at + form.to_shard(count), row + count
    return data.flatten()


def answer(
    legs: FixedLegs, layer: int, rows: Seq[int], wide: bool, came: Tensor
) -> tuple[Tensor, dict[int, int]]:
    """Run a shard's experts: the messages for all homes in the order of their ranks, and their bytes."""
    shard, form, table = legs.shard, legs.form, legs.table(rows, wide)
    assert shard is not None
    x_MD, ids_MK, bits_MK = take_in(came, table, form.width, form.k, form.dtype)
    out_MKD = run_held(x_MD, ids_MK, bits_MK.view(torch.float32), shard.experts[layer])
    sizes = {home: form.to_home(count, wide) for home, count in sorted(legs.arrivals(rows))}
    data = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=came.device)
    hand_back(came, table, ids_MK, out_MKD, data)
    return data, sizes


def collect(legs: FixedLegs, rows: int, wide: bool, came: Tensor, last: bool) -> Tensor:
    """Sum what the shards sent back for this home's rows, `[C, D]` fp32, in the router's order."""
    form, pairs = legs.form, rows * legs.form.k
    per = came.view(len(legs.shard_S), form.to_home(rows, wide))
    back_SRD, places, seal_S4 = form.split(per, form.room(rows, wide), (pairs, 1))
    places_SN = places.squeeze(-1)
    if last:
        everywhere = (places_SN >= 0).any(0).all()
        legs.faults[0].logical_or_((seal_S4 != legs.seal).any() | ~everywhere)
    return sum_of_shards(back_SRD, places_SN, form.k, legs.faults[1])


class FixedExperts:
    """The routed experts of a step of fixed sizes; see `experts.Experts`."""

    def __init__(self, legs: FixedLegs, sizes: Sizes) -> None:
        self.legs, self.sizes = legs, sizes
        self._out: dict[tuple[int, int], Leg] = {}
        self._last = legs.lanes.stage_layers[0].stop - 1

    @property
    def places(self) -> tuple[int, ...]:
        """See `FixedLegs.places`."""
        return self.legs.places

    @property
    def key(self) -> Sizes:
        """See `FixedLegs.key`."""
        return self.legs.key(self.sizes)

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Legs 1 or 2, and what of leg 2 comes here."""
        legs, rows = self.legs, self.sizes.rows[micro_batch]
        assert legs.replica is not None
        form, count, data = legs.form, rows[legs.replica], legs.nothing
        assert len(x_TD) == count
        go: dict[int, int] = {}
        come = come_to_shard(legs, rows) if legs.shard is not None else {}
        if count and legs.router is None:
            data = torch.empty(form.to_router(count), dtype=torch.uint8, device=x_TD.device)
            x, ids, mark = form.split(data, count, (count, 1))
            x.copy_(x_TD)
            ids.copy_(ids_T.unsqueeze(1))
            mark.copy_(legs.seal)
            go = {legs.lanes.dispatcher(layer, legs.replica): len(data)}
        elif count:
            data = dispatch(legs, layer, [count], x_TD, ids_T, [legs.seal])
            go = dict.fromkeys(legs.lanes.shards, form.to_shard(count))
        if come or go:
            tag = TAG_SHARD if legs.router is not None else TAG_ROUTER
            self._out[layer, micro_batch] = legs.start(tag, come, data, go)

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """Leg 3, and what of it goes from here."""
        legs, rows = self.legs, self.sizes.rows[micro_batch]
        assert legs.replica is not None
        wide = self.sizes.wide
        count, form, data = rows[legs.replica], legs.form, legs.nothing
        sent, go = self._out.pop((layer, micro_batch), None), dict[int, int]()
        came = sent.take() if sent is not None else legs.nothing
        if legs.shard is not None and sent is not None:
            data, go = answer(legs, layer, rows, wide, came)
        come = dict.fromkeys(legs.lanes.shards, form.to_home(count, wide)) if count else {}
        back = legs.start(TAG_HOME, come, data, go).take() if come or go else legs.nothing
        if not count:
            return torch.zeros(0, form.width, device=legs.device)
        return collect(legs, count, wide, back, layer == self._last)

    def settle(self) -> None:
        """Nothing is under way: every leg has been waited for."""


def come_to_shard(legs: FixedLegs, rows: Seq[int]) -> dict[int, int]:
    """Bytes of leg 2 from each dispatcher."""
    return {d: sum(map(legs.form.to_shard, legs.blocks(d, rows))) for d in legs.dispatchers(rows)}


def serve_shard_fixed(legs: FixedLegs, sizes: Sizes) -> None:
    """Serve every pass of one step, as a shard of its own."""
    passes = [(layer, m) for layer in legs.lanes.stage_layers[0] for m in range(len(sizes.rows))]
    # A GPU that runs a kernel for the first time may stop for it until all others have ended. One that
    # waits for the next rows while this pass has yet to be answered would never end, so that rows are
    # asked for ahead only in a graph: what it holds has run before.
    ahead = 1 if legs.device.type == "cpu" or torch.cuda.is_current_stream_capturing() else 0
    coming: list[Leg] = []
    leaving: list[Leg] = []
    for i, (layer, m) in enumerate(passes):
        for _, next_m in passes[i + len(coming) : i + 1 + ahead]:
            come = come_to_shard(legs, sizes.rows[next_m])
            coming.append(legs.start(TAG_SHARD, come, legs.nothing, {}))
        came = coming.pop(0).take()
        _let_go(leaving, len(sizes.rows))
        data, go = answer(legs, layer, sizes.rows[m], sizes.wide, came)
        leaving.append(legs.start(TAG_HOME, {}, data, go))
    for leg in leaving:
        leg.take()


def serve_router_fixed(legs: FixedLegs, sizes: Sizes) -> None:
    """Route every pass of one step, as a router of its own."""
    form, rank, leaving = legs.form, legs.fabric.rank, list[Leg]()
    for layer in legs.lanes.stage_layers[0]:
        for rows in sizes.rows:
            blocks = legs.blocks(rank, rows)
            if not blocks:
                continue
            homes = sorted(h for r, h in enumerate(legs.lanes.homes[0]) if _routes(legs, r, rows))
            of = {h: rows[legs.lanes.homes[0].index(h)] for h in homes}
            come = {home: form.to_router(count) for home, count in of.items()}
            came, parts, at = legs.start(TAG_ROUTER, come, legs.nothing, {}).take(), {}, 0
            _let_go(leaving, len(sizes.rows))
            for home, count in of.items():
                parts[home] = form.split(came[at : at + come[home]], count, (count, 1))
                at += come[home]
            # Blocks go on in the order of replicas.
            order = [parts[h] for h in legs.lanes.homes[0] if h in parts]
            x_TD = torch.cat([p[0] for p in order])
            ids_T = torch.cat([p[1] for p in order]).squeeze(1).long()
            data = dispatch(legs, layer, blocks, x_TD, ids_T, [p[2] for p in order])
            go = dict.fromkeys(legs.lanes.shards, sum(map(form.to_shard, blocks)))
            leaving.append(legs.start(TAG_SHARD, {}, data, go))
    for leg in leaving:
        leg.take()


def _let_go(leaving: list[Leg], keep: int) -> None:
    """Wait for what has surely arrived, so that its memory can be used again.

    Homes sent the rows that just came after they had what was sent for them a layer ago.
    """
    while len(leaving) > keep:
        leaving.pop(0).take()


def _routes(legs: FixedLegs, replica: int, rows: Seq[int]) -> bool:
    return bool(rows[replica]) and legs.lanes.dispatcher(0, replica) == legs.fabric.rank
