"""Rows out of the messages that a shard gets, and outputs into those that it sends home.

The messages are those of steps of fixed sizes. A table says where each row lies: they come from homes one
after the other, each message in parts.

Legend: M rows of all homes, K experts per token, D width, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

# Columns of the table, int64; offsets in bytes. Of what comes: a row's values, expert ids and weights; the
# seal. Of what goes: the outputs of the row's home and how many fit; the row's places; the seal. Seals
# are those of a home, at its first row, -1 at others. FIRST is the home's first row.
COLUMNS = 9
_X, _IDS, _BITS, _SEAL, _FIRST, _OUT, _ROOM, _PLACES, _SEAL_OUT = range(COLUMNS)
_WIDE, _AT_ONCE = 1024, 256


def _at(data_B: Tensor, offset_N: Tensor, size: int) -> Tensor:
    """Indices of `size` bytes from each offset on, `[N, size]`."""
    return offset_N.unsqueeze(-1) + torch.arange(size, device=data_B.device)


@Kernel
def take_in(
    came_B: Tensor, table_M9: Tensor, width: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the rows of all messages together.

    Args:
        came_B: uint8. table_M9: see `COLUMNS`. width: D.

    Returns:
        rows `[M, D]` in `dtype`, expert ids `[M, K]` int32 (-1: elsewhere), weights `[M, K]` as int32 bits.
    """
    x = came_B[_at(came_B, table_M9[:, _X], width * dtype.itemsize)].view(dtype)
    ids, bits = (
        came_B[_at(came_B, table_M9[:, c], 4 * k)].view(torch.int32) for c in (_IDS, _BITS)
    )
    return x, ids, bits


@Kernel
def hand_back(
    came_B: Tensor, table_M9: Tensor, ids_MK: Tensor, out_MKD: Tensor, data_B: Tensor
) -> None:
    """Write the messages home: outputs of experts that are here one after the other, and where they stand.

    Args:
        came_B: what came; home's seal goes back as it is.
        ids_MK: int32, -1 where the expert is elsewhere.
        out_MKD: outputs; those of experts elsewhere are not read.
        data_B: to write, uint8. A place beyond the room is told, and its row left out.
    """
    (rows, k), size = ids_MK.shape, out_MKD.shape[-1] * out_MKD.dtype.itemsize
    if not rows:
        return
    held_N = (ids_MK >= 0).flatten()
    before_N = held_N.cumsum(0) - held_N.long()
    place_MK = (before_N - before_N[table_M9[:, _FIRST] * k].repeat_interleave(k)).view(rows, k)
    places = torch.where(held_N.view(rows, k), place_MK, -1).to(torch.int32)
    data_B[_at(data_B, table_M9[:, _PLACES], 4 * k)] = places.view(torch.uint8)
    m, choice = ((places >= 0) & (places < table_M9[:, _ROOM, None])).nonzero(as_tuple=True)
    at = table_M9[m, _OUT] + place_MK[m, choice] * size
    data_B[_at(data_B, at, size)] = out_MKD[m, choice].contiguous().view(torch.uint8)
    some = table_M9[table_M9[:, _SEAL] >= 0]
    data_B[_at(data_B, some[:, _SEAL_OUT], 16)] = came_B[_at(came_B, some[:, _SEAL], 16)]


@jit
def _take_in_kernel(
    came, ints, table, x, ids, bits, D, COLUMNS: tl.constexpr, ITEM: tl.constexpr, EVEN: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    m, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table += m * COLUMNS
    start = tl.multiple_of(tl.load(table) // ITEM, EVEN)
    d = part * WIDE + tl.arange(0, WIDE)
    tl.store(x + m * D + d, tl.load(came + start + d, mask=d < D), mask=d < D)
    if part == 0:
        k = tl.arange(0, KP)
        for c in tl.static_range(2):
            value = tl.load(ints + tl.load(table + 1 + c) // 4 + k, mask=k < K)
            tl.store((ids if c == 0 else bits) + m * K + k, value, mask=k < K)


@take_in.twin("triton", runs)
def _take_in(
    came_B: Tensor, table_M9: Tensor, width: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(table_M9)
    x = came_B.new_empty(rows, width, dtype=dtype)
    ids, bits = (came_B.new_empty(rows, k, dtype=torch.int32) for _ in range(2))
    if rows:
        _take_in_kernel[(rows, triton.cdiv(width, _WIDE))](
            came_B.view(dtype), came_B.view(torch.int32), table_M9, x, ids, bits, width, COLUMNS=COLUMNS,
            ITEM=dtype.itemsize, EVEN=_even(width), K=k, KP=triton.next_power_of_2(k), WIDE=_WIDE,
            num_warps=4, **early(),
        )  # fmt: skip
    return x, ids, bits


@jit
def _hand_back_kernel(
    came, table, ids, out, data, ints, D, COLUMNS: tl.constexpr, ITEM: tl.constexpr, EVEN: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    m, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table += m * COLUMNS
    seal, first, start = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5) // ITEM
    room, places, seal_out = tl.load(table + 6), tl.load(table + 7) // 4, tl.load(table + 8)
    start = tl.multiple_of(start, EVEN)
    found = tl.zeros((AT_ONCE,), tl.int64)
    for at in range(first * K, m * K, AT_ONCE):
        pair = at + tl.arange(0, AT_ONCE)
        found += (tl.load(ids + pair, mask=pair < m * K, other=-1) >= 0).to(tl.int64)
    place = tl.sum(found, 0)
    d = part * WIDE + tl.arange(0, WIDE)
    for k in tl.static_range(K):
        held = tl.load(ids + m * K + k) >= 0
        if part == 0:
            tl.store(ints + places + k, tl.where(held, place, -1).to(tl.int32))
        if held & (place < room):
            row = tl.load(out + (m * K + k) * D + d, mask=d < D)
            tl.store(data + start + place * D + d, row, mask=d < D)
        place += held.to(tl.int64)
    if (seal >= 0) & (part == 0):
        word = tl.arange(0, 4)
        tl.store(ints + seal_out // 4 + word, tl.load(came + seal // 4 + word))


@hand_back.twin("triton", runs)
def _hand_back(
    came_B: Tensor, table_M9: Tensor, ids_MK: Tensor, out_MKD: Tensor, data_B: Tensor
) -> None:
    rows, k, width = out_MKD.shape
    if rows:
        _hand_back_kernel[(rows, triton.cdiv(width, _WIDE))](
            came_B.view(torch.int32), table_M9, ids_MK.contiguous(), out_MKD.contiguous(),
            data_B.view(out_MKD.dtype), data_B.view(torch.int32), width, COLUMNS=COLUMNS,
            ITEM=out_MKD.dtype.itemsize, EVEN=_even(width), K=k, WIDE=_WIDE, AT_ONCE=_AT_ONCE,
            num_warps=4, **early(),
        )  # fmt: skip


def _even(width: int) -> int:
    """What row starts are a multiple of, in values, as far as loads of 16 bytes want to know."""
    return 8 if width % 8 == 0 else 1
