"""Launch products with dense matrices; which tiles, and where a matrix's columns are cut."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels import dense_hopper, dense_wide
from whalepod.kernels.counters import zeros
from whalepod.kernels.dense_hopper import Cut, Kind
from whalepod.kernels.jit import INTERPRETED, triton
from whalepod.kernels.overlap import early

_BLOCK, _PROGRAMS, _APART_ROWS = 128, 264, 128
_JOIN_ROWS, _WIDE = 32, 512
Tile = tuple[int, int, int, int]  # outputs, rows, warps, stages
_SMALL: tuple[Tile, ...] = ((64, 16, 4, 4), (64, 32, 4, 4), (64, 64, 4, 4))
_LARGE: dict[Kind, Tile] = {
    "fp8": (64, 128, 4, 3),  # eight warps would share inputs unsafely, see `fp4_experts.py`
    "quant": (64, 128, 4, 3),  # it keeps two sums of a tile, and a third where chunks are added
    "bf16": (128, 128, 8, 3),
}
_FILLS: dict[Kind, int] = {"fp8": 132, "quant": 132, "bf16": 132}  # large tiles that are enough


def tile_of(kind: Kind, rows: int, outputs: int, apart: int = 1, fp32: bool = False) -> Tile:
    """The smallest tile that holds all rows; large ones where enough of them occupy a GPU.

    Args:
        outputs: of a group. apart: how many groups and chunks have tiles of their own.
    """
    if fp32:  # tiles of four bytes a number: more stages would not fit
        n, m, warps, _ = next((t for t in _SMALL if rows <= t[1]), _SMALL[-1])
        return n, m, warps, 2
    for tile in _SMALL:
        if rows <= tile[1]:
            return tile
    n, m, *_ = _LARGE[kind]
    fills = triton.cdiv(rows, m) * triton.cdiv(outputs, n) * apart >= _FILLS[kind]
    return _LARGE[kind] if fills else _SMALL[-1]


def chunk_of(outputs: int, columns: int, groups: int, kind: Kind) -> int:
    """Blocks of 128 columns that are summed before anything is added to their sum.

    A function of the matrix alone: few rows give every chunk a program, so that a small matrix
    still occupies the GPU, and many rows keep the same order of sums.
    """
    blocks, tiles = triton.cdiv(columns, _BLOCK), triton.cdiv(outputs, 64) * groups
    chunks = max(1, round(_PROGRAMS / tiles))
    return int(max(2 if kind == "bf16" else 4, triton.cdiv(blocks, chunks)))


def dense(
    x: Tensor, scales: Tensor | None, w: Tensor, w_scales: Tensor | None, kind: Kind,
    outputs: int, columns: int, dtype: torch.dtype, groups: int = 1, parts: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply rows by a matrix; see `dense_triton.py` for the forms of the operands.

    Returns:
        `[M, groups * outputs]` in `dtype`, or with `parts` `[C, M, groups * outputs]` fp32 whose sum
        in order is the product; C is 1 where the kernel has already added up.
    """
    rows = x.shape[0]
    chunk = chunk_of(outputs, columns, groups, kind)
    if kind == "fp8" and w_scales is not None and not parts and dense_wide.pays(x, columns):
        return dense_wide.product(x, w, w_scales, outputs, columns, groups, chunk, dtype)
    chunks = triton.cdiv(triton.cdiv(columns, _BLOCK), chunk)
    hopper = dense_hopper.runs(x, w, kind, columns, groups)
    if hopper:
        cut = dense_hopper.cut_of(kind, rows, outputs, columns, groups, chunks)
    else:
        apart = rows <= _APART_ROWS and chunks > 1
        of_group = groups * (chunks if apart else 1)
        cut = Cut(*tile_of(kind, rows, outputs, of_group, x.dtype == torch.float32), apart)
    whole = not (cut.apart or parts)
    out = x.new_empty(
        *(() if whole else (chunks if cut.apart else 1,)), rows, groups * outputs,
        dtype=dtype if whole else torch.float32,
    )  # fmt: skip
    if not rows:
        return out if whole or parts else x.new_empty(0, groups * outputs, dtype=dtype)
    exact = INTERPRETED or x.dtype == torch.float32
    tiles = triton.cdiv(outputs, cut.outputs) * triton.cdiv(rows, cut.rows)
    added = cut.apart and not parts
    join = added and rows <= _JOIN_ROWS
    made = x.new_empty(rows, groups * outputs, dtype=dtype) if added else out
    grid = tiles, chunks if cut.apart else 1, groups
    scaled = w if scales is None else scales, w if w_scales is None else w_scales
    rest = (
        out, made, zeros(x.device, tiles * groups) if join else None, rows, outputs, columns, kind,
        groups, chunk, cut.apart, join, cut.outputs, cut.rows,
    )  # fmt: skip
    if hopper:
        dense_hopper.launch(grid, x, w, scaled, rest, kind, cut, columns)
    else:
        dense_kernel[grid](
            x, scaled[0], w, scaled[1], *rest, EXACT=exact, num_warps=cut.warps,
            num_stages=cut.stages, **early(),
        )  # fmt: skip
    if added and not join:
        sum_kernel[(triton.cdiv(made.numel(), _WIDE),)](
            out, made, made.numel(), CHUNKS=chunks, WIDE=_WIDE, EXACT=exact, num_warps=2, **early()
        )
    return made


if triton is not None:
    from whalepod.kernels.dense_triton import dense_kernel, sum_kernel
