"""What a pass derives from its positions, each in one launch: rotations, visible entries, pool rows.

Legend: T rows, P rotated pairs, S sequences, B blocks of a table, K entries of a row.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

_WIDE = 256
_LIBRARY = not INTERPRETED if tl is None else tl.constexpr(not INTERPRETED)


@Kernel
def turns(positions_T: Tensor, freqs: Tensor, ratio: int = 1) -> Tensor:
    """Unit complex numbers `exp(i * position * frequency)`.

    Args:
        positions_T: `[T]` int64.
        freqs: `[P]` fp32, radians per position.
        ratio: of the position, its window's first one: the largest multiple of this up to it.

    Returns:
        `[T, P]` complex64; angles are formed in fp32 as the reference does.
    """
    first_T = positions_T if ratio == 1 else positions_T // ratio * ratio
    angles = first_T.to(torch.float32).unsqueeze(-1) * freqs
    return torch.polar(torch.ones_like(angles), angles)


@Kernel
def entries_seen(positions_T: Tensor, ratio: int, most: int) -> Tensor:
    """How many compressed entries a row sees: those whose window ends with it or before it.

    Args:
        positions_T: `[T]` int64. ratio: positions of a window. most: a bound on the result.

    Returns:
        `[T]` int32.
    """
    return ((positions_T + 1) // ratio).clamp(max=most).int()


@Kernel
def pool_rows(order_TK: Tensor, table_SB: Tensor, sequences_T: Tensor, per: int) -> Tensor:
    """Where a sequence's entries lie in a pool.

    Args:
        order_TK: `[T, K]` int64, entries by their order in the sequence.
        table_SB: `[S, B]` int32 blocks. sequences_T: `[T]` int32, rows of it. per: entries of a block.

    Returns:
        `[T, K]` int64 rows of the pool.
    """
    blocks = table_SB[sequences_T.long()].gather(1, order_TK // per).long()
    return blocks * per + order_TK % per


@jit
def _turns_kernel(
    positions, freqs, out, RATIO: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t, p = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    first = tl.load(positions + t) // RATIO * RATIO
    angle = first.to(tl.float32) * tl.load(freqs + p, mask=p < P, other=0.0)
    if _LIBRARY:  # exact to the last bit or two for angles of millions, too
        cos, sin = libdevice.cos(angle), libdevice.sin(angle)
    else:
        cos, sin = tl.cos(angle), tl.sin(angle)
    at = out + (t * P + p) * 2
    tl.store(at, cos, mask=p < P)
    tl.store(at + 1, sin, mask=p < P)


@turns.twin("triton", runs)
def _turns(positions_T: Tensor, freqs: Tensor, ratio: int = 1) -> Tensor:
    count, pairs = len(positions_T), len(freqs)
    out = freqs.new_empty(count, pairs, 2)
    if count:
        _turns_kernel[(count,)](
            positions_T, freqs, out, RATIO=ratio, P=pairs,
            WIDTH=triton.next_power_of_2(pairs), num_warps=1, **early(),
        )  # fmt: skip
    return torch.view_as_complex(out)


@jit
def _seen_kernel(
    positions, out, T, most, RATIO: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    seen = (tl.load(positions + t, mask=t < T, other=0) + 1) // RATIO
    tl.store(out + t, tl.minimum(seen, most).to(tl.int32), mask=t < T)


@entries_seen.twin("triton", runs)
def _entries_seen(positions_T: Tensor, ratio: int, most: int) -> Tensor:
    count = len(positions_T)
    out = torch.empty(count, dtype=torch.int32, device=positions_T.device)
    if count:
        _seen_kernel[(triton.cdiv(count, _WIDE),)](
            positions_T, out, count, most, RATIO=ratio, WIDE=_WIDE, num_warps=2, **early()
        )
    return out


@jit
def _rows_kernel(
    order, table, sequences, out, K, width, PER: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    kept = k < K
    of = table + tl.load(sequences + t).to(tl.int64) * width
    entry = tl.load(order + t * K + k, mask=kept, other=0)
    block = tl.load(of + entry // PER, mask=kept, other=0).to(tl.int64)
    tl.store(out + t * K + k, block * PER + entry % PER, mask=kept)


@pool_rows.twin("triton", runs)
def _pool_rows(order_TK: Tensor, table_SB: Tensor, sequences_T: Tensor, per: int) -> Tensor:
    order, table = order_TK.contiguous(), table_SB.contiguous()
    count, most = order.shape
    out = torch.empty_like(order)
    if out.numel():
        _rows_kernel[(count, triton.cdiv(most, _WIDE))](
            order, table, sequences_T, out, most, table.shape[1], PER=per, WIDE=_WIDE,
            num_warps=2, **early(),
        )  # fmt: skip
    return out


if triton is not None:
    from triton.language.extra import libdevice
