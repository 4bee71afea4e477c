"""Window keys: normalise, rotate, round, and put those of decoding rows into their rings.

Legend: T tokens, D head_dim, P rotated pairs, N slots, W window.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.entries import Rounding, Storage, put, round_entries
from whalepod.kernels.entries_triton import flat, layout, put_rows
from whalepod.kernels.jit import FIXED, jit, runs, tl
from whalepod.kernels.narrow import rounded
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel
from whalepod.kernels.rms_norm import normed, rms_norm
from whalepod.kernels.rope import rotate_, turned


@Kernel
def window_rows(
    kv_TD: Tensor,
    norm_D: Tensor,
    turns_TP: Tensor,
    eps: float,
    rounding: Rounding,
    rings: Storage | None = None,
    window: int = 0,
    slots_N: Tensor | None = None,
    positions_T: Tensor | None = None,
) -> Tensor:
    """Make window keys of projections.

    Args:
        kv_TD: `[T, D]` bf16 or fp32, last dim contiguous.
        norm_D: `[D]` fp32.
        turns_TP: `[T, P]` complex64.
        eps: of the norm.
        rounding: `kv` or `none`, see `round_entries`.
        rings: `[N, W, D]`, or pages of `window` entries, one a slot; the first rows go there.
        window: W.
        slots_N: `[n]` int64, the slots of the first n rows.
        positions_T: `[T]` int64; row t lies at `positions_T[t] % W` of its ring.

    Returns:
        `[T, D]` in the dtype of `kv_TD`, rounded to it after the norm and after the rotation.
    """
    rows = rotate_(rms_norm.reference(kv_TD, norm_D, eps), turns_TP)
    if rings is not None and slots_N is not None and positions_T is not None:
        count = len(slots_N)
        at = slots_N * window + positions_T[:count] % window
        put(flat(rings), at, rows[:count], rounding, 2 * turns_TP.shape[1])
    return round_entries(rows, rounding, 2 * turns_TP.shape[1])


@jit
def _kernel(
    kv, norm, turns, slots, positions, out, stride, count, W: tl.constexpr,
    dense, data, wide, STRIDE: tl.constexpr, COUNT: tl.constexpr, DATA: tl.constexpr,
    SCALES: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROUNDING: tl.constexpr,
    PAGED: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr, CUTS: tl.constexpr,
    WIDTH: tl.constexpr, EPS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    d, one = tl.arange(0, WIDTH)[None, :], tl.arange(0, 1)
    weight = tl.load(norm + d, mask=d < D, other=0.0)  # weights do not wait
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    value = tl.load(kv + t * stride + d, mask=d < D, other=0.0).to(tl.float32)
    value = normed(value, D, EPS) * weight
    value = rounded(value, KIND, CUTS).to(tl.float32)
    value = turned(value, turns + t * (2 * PAIRS), D, PAIRS, 1, WIDTH)
    value = rounded(value, KIND, CUTS).to(tl.float32)
    row = one.to(tl.int64)
    inserted = t < count
    if slots is not None:  # noqa: SIM102 - known when it is compiled, the other when it runs
        if inserted:
            row += tl.load(slots + t) * W + tl.load(positions + t) % W
    value = put_rows(
        value, row, (one == 0) & inserted, dense, data, wide, STRIDE, COUNT, DATA, SCALES, D,
        PAIRS, ROUNDING, PAGED, KIND, FACTOR, CUTS, 1, WIDTH,
    )  # fmt: skip
    tl.store(out + t * D + d, rounded(value, KIND, CUTS), mask=d < D)


@window_rows.twin("triton", runs)
def _window_rows(
    kv_TD: Tensor,
    norm_D: Tensor,
    turns_TP: Tensor,
    eps: float,
    rounding: Rounding,
    rings: Storage | None = None,
    window: int = 0,
    slots_N: Tensor | None = None,
    positions_T: Tensor | None = None,
) -> Tensor:
    tokens, size = kv_TD.shape
    out = torch.empty(kv_TD.shape, dtype=kv_TD.dtype, device=kv_TD.device)
    turns = torch.view_as_real(turns_TP).contiguous()
    count = 0 if rings is None or slots_N is None else len(slots_N)
    if tokens:
        _kernel[(tokens,)](
            kv_TD, norm_D, turns, slots_N, positions_T, out, kv_TD.stride(0), count, W=window,
            EPS=eps, num_warps=1 if size <= 128 else 4,
            **FIXED,
            **early(),
            **layout(None if rings is None else flat(rings), kv_TD.dtype, size, turns.shape[1], rounding),
        )  # fmt: skip
    return out
