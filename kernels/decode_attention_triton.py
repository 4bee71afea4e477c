"""Launch decode attention's Triton kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whalepod.kernels import attention_triton
from whalepod.kernels.attention_triton import combine_kernel
from whalepod.kernels.decode_attention import (
    Entries,
    decode_attention,
    widened,
    widened_rings,
)
from whalepod.kernels.jit import INTERPRETED, on_hopper, runs, triton
from whalepod.kernels.overlap import early


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a query's work is cut. `keys` and `split` decide its bits: one choice for a model.

    Args:
        keys: of a tile.
        split: tiles that are summed in one run.
        warps, stages: of a program.
        gluon: overlap copies and products where the device can.
        whole: let one program take all parts of a query, or each a program; None chooses. The same bits.
    """

    keys: int = 64
    split: int = 10
    warps: int = 8
    stages: int = 2
    gluon: bool = True
    whole: bool | None = None


TILES = Tiles()


def fits(q: Tensor) -> bool:
    """Whether the kernels take this: tiles of fp32 do not fit a GPU's shared memory."""
    return INTERPRETED or q.dtype == torch.bfloat16


def sources(entries: Entries | None, q: Tensor, rings: Tensor) -> tuple[dict[str, object], int]:
    """Kernel arguments that name the entries, and a bound on their number."""
    if entries is None or not entries.most:
        none = torch.zeros(len(q), dtype=torch.int32, device=q.device)
        empty = {"pool": rings, "rows": none, "table": none, "seen": none, "listed": 0}
        return {**empty, "width": 0, "PER": 1, "LISTED": False}, 0
    rows, table = entries.rows_NK, entries.table_SB
    some = rows if table is None else table
    assert some is not None
    return {
        "pool": entries.pool,
        "rows": some if rows is None else rows,
        "table": some if table is None else table,
        "seen": entries.seen_N,
        "listed": 0 if rows is None else rows.shape[1],
        "width": 0 if table is None else table.shape[1],
        "PER": entries.per,
        "LISTED": rows is not None,
    }, entries.most


def kernels(device: torch.device, tiles: Tiles) -> tuple[Any, dict[str, int]]:
    """The module whose kernels run on a device, and what they need besides."""
    if tiles.gluon and on_hopper(device):
        from whalepod.kernels import attention_gluon  # noqa: PLC0415 - for Hopper alone

        return attention_gluon, {"num_warps": 8}
    return attention_triton, {"STAGES": tiles.stages, "num_warps": tiles.warps}


def head_block(heads: int, source: Any) -> int:
    """Heads of a program."""
    if source is not attention_triton:
        return 64
    return min(64, max(16, 1 << (heads - 1).bit_length()))


@decode_attention.twin("triton", runs)
def _decode(
    q_NHD: Tensor,
    rings: Tensor,
    slots_N: Tensor,
    positions_N: Tensor,
    entries: Entries | None,
    sink_H: Tensor,
    turns_NP: Tensor,
    tiles: Tiles = TILES,
) -> Tensor:
    if not fits(q_NHD):
        return decode_attention.reference(
            q_NHD, rings, slots_N, positions_N, entries, sink_H, turns_NP
        )
    n, heads, d = q_NHD.shape
    rings, slots_N = widened_rings(rings, slots_N, q_NHD)
    entries = widened(entries, q_NHD)
    w, rd = rings.shape[1], 2 * turns_NP.shape[1]
    turns = torch.view_as_real(turns_NP).contiguous()
    kinds, most = sources(entries, q_NHD, rings)
    source, extra = kernels(q_NHD.device, tiles)
    h = head_block(heads, source)
    blocks = triton.cdiv(heads, h)
    parts = triton.cdiv(triton.cdiv(w, tiles.keys) + triton.cdiv(most, tiles.keys), tiles.split)
    out = torch.empty_like(q_NHD)
    cut = {"H": h, "D": d, "RD": rd, "W": w, "BN": tiles.keys, "SPLIT": tiles.split}
    many, items = processors(q_NHD.device), n * blocks
    one = _whole_pays(items, parts, many, tiles.split) if tiles.whole is None else tiles.whole
    if parts > 1 and one:
        programs = min(items, many)
        scratch = torch.empty(programs * h, d, dtype=torch.float32, device=q_NHD.device)
        source.prefill_kernel[(programs,)](
            q=q_NHD, new=rings, rings=rings, slots=slots_N, positions=positions_N, starts=positions_N,
            sequences=slots_N, sink=sink_H, turns=turns, out=out, scratch=scratch, scale=scale_of(d),
            T=n, FIRST=0, HEADS=heads, NEW=False, **extra, **kinds, **cut, **early(),
        )  # fmt: skip
        return out
    size = n * parts * blocks * h if parts > 1 else 1
    sums = torch.empty(size, d, dtype=torch.float32, device=q_NHD.device)
    stats = torch.empty(size, 2, dtype=torch.float32, device=q_NHD.device)
    source.decode_kernel[(blocks, parts, n)](
        q=q_NHD, rings=rings, slots=slots_N, positions=positions_N, sink=sink_H, turns=turns,
        out=out, parts=sums, stats=stats, scale=scale_of(d), HEADS=heads, ALONE=parts == 1,
        **extra, **kinds, **cut, **early(),
    )  # fmt: skip
    if parts > 1:
        few = min(8, h)
        combine_kernel[(triton.cdiv(heads, few), n)](
            sums, stats, kinds["seen"], most, sink_H, turns, out, parts, blocks, heads, HB=few,
            num_warps=4, **cut, **early(),
        )  # fmt: skip
    return out


def processors(device: torch.device) -> int:
    """How many programs run at once."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _whole_pays(items: int, parts: int, many: int, split: int) -> bool:
    """Whether to let one program take all parts of an item, in tiles that programs do one after the other.

    Parts apart occupy a GPU with few items; their sums are written and read again, about a seventieth of a
    tile's time each.
    """
    apart = triton.cdiv(items * parts, many) * split + items * parts / 70
    return bool(triton.cdiv(items, many) * parts * split < apart)


def scale_of(dims: int) -> float:
    """Of a product of query and key, in base 2."""
    return math.log2(math.e) / math.sqrt(dims)
