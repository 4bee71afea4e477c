"""Sort (token, choice) pairs by expert on the device, without asking it for a size.

Legend: T tokens, K choices a token, R = T * K pairs, E experts of the model, S experts held here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

# Pairs of a program, few or many; pairs that each program counts by itself, in this many elements.
_FEW, _CHUNK, _ALL = 32, 128, (32, 128, 512, 2048)


class Route(NamedTuple):
    """Pairs in order of experts, cut into blocks of one expert each; everything int32.

    Args:
        order: `[R]` pair ids `t * K + k`: ascending within an expert, absent experts' pairs last.
        slots: `[B]` whose block this is: an index into the experts held here, -1 where absent.
        starts, stops: `[B]` the block's places in `order`.
        used: `[1]` how many of the B blocks exist; what lies behind them is not written.
    """

    order: Tensor
    slots: Tensor
    starts: Tensor
    stops: Tensor
    used: Tensor


class Alone(NamedTuple):
    """The pairs of one token, which need no sorting: each is a block of its own.

    Args:
        slot_of_E: `[E]` int32: where each expert lies here, -1 for one that is not here.
        experts_K: int32 or int64; ids outside the model count as absent.
    """

    slot_of_E: Tensor
    experts_K: Tensor


class Blocks(NamedTuple):
    """Rows of a block; experts of more than `most` pairs are cut into blocks of `crowd` rows instead."""

    rows: int
    most: int = (1 << 31) - 1
    crowd: int = 0

    def bound(self, pairs: int, held: int) -> int:
        """How many can occur: the bound of a grid."""
        return min(pairs, pairs // self.rows + min(pairs, held + 1))

    def bound_crowded(self, pairs: int) -> int:
        """How many can be of crowded experts."""
        return pairs // self.crowd + pairs // (self.most + 1) if self.crowd else 0


@Kernel
def route(experts_TK: Tensor, slot_of_E: Tensor, held: int, blocks: Blocks) -> Route:
    """Group the router's choices by expert; the blocks of crowded experts come first.

    Args:
        experts_TK: `[T, K]` int32 or int64 expert ids; ids outside the model count as absent.
        slot_of_E: `[E]` int32: where each expert lies here, from 0, or -1 for one that is not here.
        held: S.
        blocks: rows that a block holds at most.
    """
    flat = experts_TK.flatten().long()
    inside = (flat >= 0) & (flat < slot_of_E.numel())
    slot = slot_of_E[flat.clamp(0, slot_of_E.numel() - 1)].masked_fill(~inside, -1)
    key = torch.where(slot < 0, held, slot)
    order = torch.argsort(key, stable=True).int()
    made: tuple[list[tuple[int, int, int]], ...] = [], []
    start = 0
    for expert, count in enumerate(torch.bincount(key, minlength=held + 1).tolist()):
        held_slot, many = expert if expert < held else -1, count > blocks.most
        rows = blocks.crowd if many else blocks.rows
        for at in range(start, start + count, rows):
            made[not many].append((held_slot, at, min(at + rows, start + count)))
        start += count
    out, found = _empty(flat.numel(), held, blocks, flat.device), [*made[0], *made[1]]
    table = torch.tensor(found, dtype=torch.int32, device=flat.device).view(-1, 3)
    for column, into in enumerate((out.slots, out.starts, out.stops)):
        into[: len(found)] = table[:, column]
    return out._replace(order=order, used=out.used.fill_(len(found)))


def _empty(pairs: int, held: int, blocks: Blocks, device: torch.device) -> Route:
    bound = blocks.bound(pairs, held)

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=device)

    return Route(empty(pairs), empty(bound), empty(bound), empty(bound), empty(1))


@jit
def _slots(experts, slot_of, pair, pairs, EXPERTS: tl.constexpr, HELD: tl.constexpr):
    """Slots of pairs, HELD where absent or beyond the last pair."""
    expert = tl.load(experts + pair, mask=pair < pairs, other=-1)
    inside = (expert >= 0) & (expert < EXPERTS)
    slot = tl.load(slot_of + tl.where(inside, expert, 0), mask=inside, other=-1)
    return tl.where(slot < 0, HELD, slot)


@jit
def _count_kernel(
    experts, slot_of, parts, pairs,
    EXPERTS: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    slot = _slots(experts, slot_of, pair, pairs, EXPERTS, HELD)
    found = tl.histogram(slot, BINS, mask=pair < pairs)
    tl.store(parts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@jit
def _totals(
    experts, slot_of, parts, pairs, chunks, ALL: tl.constexpr, EXPERTS: tl.constexpr,
    HELD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Pairs of each slot: all, and those of earlier chunks than this program's."""
    mine = tl.program_id(0)
    total, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    if ALL == 0:
        for c in range(0, chunks, STEP):
            chunk = c + tl.arange(0, STEP)
            at = chunk[:, None] * BINS + tl.arange(0, BINS)[None, :]
            found = tl.load(parts + at, mask=(chunk < chunks)[:, None], other=0)
            total += tl.sum(found, 0)
            before += tl.sum(tl.where((chunk < mine)[:, None], found, 0), 0)
    else:
        pair = tl.arange(0, ALL)
        slot = _slots(experts, slot_of, pair, pairs, EXPERTS, HELD)
        total = tl.histogram(slot, BINS, mask=pair < pairs)
        if ALL > CHUNK:
            before = tl.histogram(slot, BINS, mask=pair < tl.minimum(pairs, mine * CHUNK))
    return total, before


@jit
def _place_kernel(
    experts, slot_of, parts, pairs, chunks, order, slots, starts, stops, used,
    ROWS: tl.constexpr, MOST: tl.constexpr, CROWD: tl.constexpr, ALL: tl.constexpr,
    EXPERTS: tl.constexpr, HELD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    mine = tl.program_id(0)
    total, before = _totals(
        experts, slot_of, parts, pairs, chunks, ALL, EXPERTS, HELD, BINS, CHUNK, STEP
    )
    first = tl.cumsum(total, 0) - total
    pair = mine * CHUNK + tl.arange(0, CHUNK)
    slot = _slots(experts, slot_of, pair, pairs, EXPERTS, HELD)
    # Pairs before this one in the chunk with the same slot: matters for the order alone.
    earlier = tl.arange(0, CHUNK)[None, :] < tl.arange(0, CHUNK)[:, None]
    rank = tl.sum(((slot[None, :] == slot[:, None]) & earlier).to(tl.int32), 1)
    tl.store(order + tl.gather(first + before, slot, 0) + rank, pair, mask=pair < pairs)
    if mine == 0:
        bins = tl.arange(0, BINS)
        rows = tl.where(total > MOST, CROWD, ROWS)
        blocks = (total + rows - 1) // rows
        block = tl.cumsum(blocks, 0) - blocks
        if CROWD > 0:  # theirs come first
            many = tl.where(total > MOST, blocks, 0)
            ahead = tl.cumsum(many, 0) - many
            block = tl.where(total > MOST, ahead, tl.sum(many, 0) + block - ahead)
        tl.store(used, tl.sum(blocks, 0))
        for j in range(0, tl.max(blocks, 0)):
            there = j < blocks
            at = first + j * rows
            tl.store(slots + block + j, tl.where(bins < HELD, bins, -1), mask=there)
            tl.store(starts + block + j, at, mask=there)
            tl.store(stops + block + j, tl.minimum(at + rows, first + total), mask=there)


@route.twin("triton", runs)
def _route(experts_TK: Tensor, slot_of_E: Tensor, held: int, blocks: Blocks) -> Route:
    experts, pairs = experts_TK.contiguous(), experts_TK.numel()
    out = _empty(pairs, held, blocks, experts.device)
    if not pairs:
        out.used.zero_()
        return out
    chunk = _FEW if pairs <= _FEW else _CHUNK  # pairs of a chunk are compared with each other
    chunks = triton.cdiv(pairs, chunk)
    bins = triton.next_power_of_2(held + 1)
    at_once = next((size for size in _ALL if size >= pairs), 0)
    parts = experts.new_empty(1 if at_once else chunks, bins, dtype=torch.int32)
    sizes = {"EXPERTS": slot_of_E.numel(), "HELD": held, "BINS": bins, "CHUNK": chunk}
    if not at_once:
        _count_kernel[(chunks,)](experts, slot_of_E, parts, pairs, **sizes, **early())
    _place_kernel[(chunks,)](
        experts, slot_of_E, parts, pairs, chunks, *out[:5],
        *blocks, ALL=at_once, STEP=8, **sizes, **early(),
    )  # fmt: skip
    return out
