"""Read key/value entries of packed pages back as rows.

A page of n entries is n times the data of one (leading dims E4M3, then 64 rotated dims in bf16)
and behind it n times 8 bytes: one E8M0 scale for 64 leading dims, and padding.

Legend: N lists, K entries of a list, D head_dim, B blocks of a list.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.entries import Pages
from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.registry import Kernel

ROTARY, GROUP, SCALES = 64, 64, 8
# Entries of a program.
_ROWS = 16


def entry_bytes(dims: int) -> int:
    """Bytes of one entry of `dims`, its scales included."""
    return dims + ROTARY + SCALES


@Kernel
def unpack(
    pages: Tensor, dims: int, per: int, lists: Tensor, blocks: bool, counts_N: Tensor | None = None
) -> Tensor:
    """Widen the listed entries.

    Args:
        pages: `[pages, stride]` uint8.
        dims: D.
        per: entries of a page.
        lists: `[N, K]` flat rows, `page * per + place`, or with `blocks` `[N, B]` pages of which
            every entry is wanted in order.
        counts_N: how many entries of each list are real; the others are not read.

    Returns:
        `[N, K or B * per, D]` bf16, exact; anything where not real.
    """
    if blocks:
        rows = (lists.long().unsqueeze(-1) * per + torch.arange(per, device=lists.device)).flatten(
            1
        )
    else:
        rows = lists.long()
    if counts_N is not None:
        real = torch.arange(rows.shape[1], device=rows.device) < counts_N.unsqueeze(-1)
        rows = rows.masked_fill(~real, 0)
    plain, data = dims - ROTARY, dims + ROTARY
    page, place = (rows // per).unsqueeze(-1), (rows % per).unsqueeze(-1)
    raw = pages[page, place * data + torch.arange(data, device=rows.device)]
    behind = per * data + place * SCALES + torch.arange(SCALES, device=rows.device)
    scales = torch.exp2(pages[page, behind].float() - 127)[..., : plain // GROUP]
    codes = raw[..., :plain].contiguous().view(torch.float8_e4m3fn).float()
    wide = (codes.unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2)
    tail = raw[..., plain:].contiguous().view(torch.bfloat16)
    return torch.cat([wide.to(torch.bfloat16), tail], dim=-1)


def read_entries(storage: Tensor | Pages, rows: Tensor, dims: int) -> Tensor:
    """Entries of flat rows, `[..., D]`: as they lie, or widened to bf16 from pages of key/value entries.

    Args:
        rows: int64, any shape; all of them are read.
    """
    if isinstance(storage, Pages):
        found = unpack(storage.bytes, dims, storage.count, rows.reshape(1, -1), False)
        return found.view(*rows.shape, dims)
    return F.embedding(rows, storage)


@jit
def unpack_kernel(
    pages, lists, counts, out, K, listed, STRIDE: tl.constexpr, D: tl.constexpr,
    PER: tl.constexpr, BLOCKS: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (groups of ROWS entries, N)."""
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = k < K
    if COUNTED:
        real = real & (k < tl.load(counts + n))
    if BLOCKS:
        page = tl.load(lists + n * listed + k // PER, mask=real, other=0).to(tl.int64)
        place = k % PER
    else:
        row = tl.load(lists + n * listed + k, mask=real, other=0).to(tl.int64)
        page, place = row // PER, row % PER
    data = pages + page * STRIDE + place * (D + 64)
    scale = pages + page * STRIDE + PER * (D + 64) + place * 8
    to = out + (n * K + k) * D
    lane = tl.arange(0, 64)[None, :]
    mask = real[:, None]
    for group in tl.static_range((D - 64) // 64):
        codes = tl.load(data[:, None] + group * 64 + lane, mask=mask, other=0)
        factor = tl.load(scale + group, mask=real, other=127).to(tl.int32)
        wide = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        wide *= (factor << 23).to(tl.float32, bitcast=True)[:, None]
        tl.store(to[:, None] + group * 64 + lane, wide.to(out.dtype.element_ty), mask=mask)
    tail = (data + (D - 64)).to(tl.pointer_type(tl.bfloat16))
    tail = tl.load(tail[:, None] + lane, mask=mask, other=0.0)
    tl.store(to[:, None] + (D - 64) + lane, tail.to(out.dtype.element_ty), mask=mask)


@unpack.twin("triton", runs)
def _unpack(
    pages: Tensor, dims: int, per: int, lists: Tensor, blocks: bool, counts_N: Tensor | None = None
) -> Tensor:
    n, listed = lists.shape
    k = listed * per if blocks else listed
    out = torch.empty(n, k, dims, dtype=torch.bfloat16, device=pages.device)
    unpack_kernel[(triton.cdiv(k, _ROWS), n)](
        pages, lists, lists if counts_N is None else counts_N, out, k, listed,
        STRIDE=pages.stride(0), D=dims, PER=per, BLOCKS=blocks, COUNTED=counts_N is not None,
        ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out
