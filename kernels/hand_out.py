"""Rows of tokens into the messages for expert shards, and the sums of what comes back.

The messages are those of steps of fixed sizes: every row goes to every shard, with the ids of its experts
there; from each shard come the outputs of those, and for every (row, choice) its place among them.

Legend: S shards in the order of messages, T rows, K experts per token, E experts, R replicas or room for
outputs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

_WIDE = 1024


@Kernel
def hand_out(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    holders_ER: Tensor,
    shard_S: Tensor,
    first: int,
    out_STD: Tensor,
    ids_STK: Tensor,
    bits_STK: Tensor,
    seals_S4: Tensor,
    seal_4: Tensor,
    counts_E: Tensor,
) -> None:
    """Write rows, ids, weights and seals into messages, and count who was chosen.

    Args:
        experts_TK: int64 ids. weights_TK: fp32.
        holders_ER: int64, shards of each expert; replicas are used in turn.
        shard_S: int64, whose messages these are.
        first: number of the first row, for the turns.
        out_STD, ids_STK, bits_STK: to write; ids int32 (-1: at another shard), weights as int32 bits. They
            may be views of messages: only within a message do rows lie one after the other.
        seals_S4: int32, to write. seal_4: what they get.
        counts_E: int64, to add to.
    """
    tokens, k = experts_TK.shape
    turn_TK = torch.arange(first * k, (first + tokens) * k, device=x_TD.device).view(tokens, k)
    shard_TK = holders_ER[experts_TK, turn_TK % holders_ER.shape[1]]
    here_STK = shard_TK == shard_S.view(-1, 1, 1)
    out_STD.copy_(x_TD.expand_as(out_STD))
    ids_STK.copy_(torch.where(here_STK, experts_TK.to(torch.int32), -1))
    bits_STK.copy_(weights_TK.float().view(torch.int32).expand_as(bits_STK))
    seals_S4.copy_(seal_4.expand_as(seals_S4))
    flat = experts_TK.flatten()
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))


@Kernel
def sum_of_shards(back_SRD: Tensor, places_SN: Tensor, k: int, crowded: Tensor) -> Tensor:
    """Take each choice from the shard that held it, and add a token's choices in their order.

    Args:
        back_SRD: outputs from each shard; only within a shard do they lie one after the other.
        places_SN: int32, N = T * K: place of a choice's output among those of a shard, -1 where the shard did
            not hold the expert.
        crowded: int32 scalar, set to 1 where a place is beyond R: that output was left out.

    Returns:
        `[T, D]` fp32, the bits of `combine`. A choice that no shard held counts as some shard's first.
    """
    where_N = (places_SN >= 0).int().argmax(0)
    place_N = places_SN.gather(0, where_N.unsqueeze(0)).squeeze(0).long()
    outside_N = place_N >= back_SRD.shape[1]
    crowded.logical_or_(outside_N.any())
    parts = back_SRD[where_N, place_N.masked_fill(outside_N, 0).clamp(min=0)]
    return combine(parts.unflatten(0, (-1, k)))


@jit
def _hand_out_kernel(
    x, experts, weights, holders, shards, first, out, ids, bits, seals, seal, counts, out_step, ids_step, D,
    K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, KP)
    some = k < K
    expert = tl.load(experts + t * K + k, mask=some, other=0)
    turn = ((first + t) * K + k) % R
    here = tl.load(holders + expert * R + turn, mask=some, other=-1) == tl.load(shards + s)
    tl.store(ids + s * ids_step + t * K + k, tl.where(here, expert, -1).to(tl.int32), mask=some)
    weight = tl.load(weights + t * K + k, mask=some, other=0.0)
    tl.store(bits + s * ids_step + t * K + k, weight.to(tl.int32, bitcast=True), mask=some)
    tl.atomic_add(counts + expert, tl.full([KP], 1, tl.int64), mask=some & (s == 0))
    if t == 0:
        word = tl.arange(0, 4)
        tl.store(seals + s * ids_step + word, tl.load(seal + word))
    for at in range(0, D, WIDE):
        d = at + tl.arange(0, WIDE)
        row = tl.load(x + t * D + d, mask=d < D)
        tl.store(out + s * out_step + t * D + d, row, mask=d < D)


@hand_out.twin("triton", runs)
def _hand_out(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, holders_ER: Tensor, shard_S: Tensor, first: int,
    out_STD: Tensor, ids_STK: Tensor, bits_STK: Tensor, seals_S4: Tensor, seal_4: Tensor, counts_E: Tensor,
) -> None:  # fmt: skip
    (tokens, k), width, shards = experts_TK.shape, x_TD.shape[1], len(shard_S)
    if tokens:
        steps = {part.stride(0) for part in (ids_STK, bits_STK, seals_S4) if shards > 1}
        assert len(steps) < 2, "parts of the same messages"
        _hand_out_kernel[(tokens, shards)](
            x_TD.contiguous(), experts_TK.contiguous(), weights_TK.float().contiguous(), holders_ER, shard_S,
            first, out_STD, ids_STK, bits_STK, seals_S4, seal_4, counts_E, out_STD.stride(0),
            ids_STK.stride(0), width, K=k, KP=triton.next_power_of_2(k), R=holders_ER.shape[1],
            WIDE=_WIDE, num_warps=4, **early(),
        )  # fmt: skip


@jit
def _sum_kernel(
    back, places, crowded, out, back_step, places_step, room, D,
    S: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for k in tl.static_range(K):
        where, place = t * 0, t * 0
        for s in range(S - 1, -1, -1):
            at = tl.load(places + s * places_step + t * K + k).to(tl.int64)
            where, place = tl.where(at >= 0, s, where), tl.where(at >= 0, at, place)
        if place >= room:
            tl.store(crowded, 1)
            place = t * 0
        row = tl.load(back + where * back_step + place * D + d, mask=d < D, other=0.0)
        total = row.to(tl.float32) if k == 0 else total + row.to(tl.float32)
    tl.store(out + t * D + d, total, mask=d < D)


@sum_of_shards.twin("triton", runs)
def _sum_of_shards(back_SRD: Tensor, places_SN: Tensor, k: int, crowded: Tensor) -> Tensor:
    (shards, room, width), pairs = back_SRD.shape, places_SN.shape[1]
    out = back_SRD.new_empty(pairs // k, width, dtype=torch.float32)
    if pairs:
        _sum_kernel[(pairs // k, triton.cdiv(width, _WIDE))](
            back_SRD, places_SN, crowded, out, back_SRD.stride(0), places_SN.stride(0), room, width,
            S=shards, K=k, WIDE=_WIDE, num_warps=4, **early(),
        )  # fmt: skip
    return out
