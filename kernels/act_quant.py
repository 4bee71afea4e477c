"""Round activations to FP8 in blocks of 128 columns, as the released weights were trained for.

Legend: M rows, K columns, B = ceil(K / 128) blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.jit import INTERPRETED, jit, runs, tl, triton
from whalepod.kernels.narrow import clamped
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

BLOCK, MOST, LEAST = 128, 448.0, 1e-4
_ROWS = 4


@Kernel
def act_quant(x_MK: Tensor, paired: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise each row's blocks of 128 columns to E4M3 with a power-of-two scale.

    The scale is `2 ** ceil(log2(max(amax, 1e-4) * fp32(1 / 448)))`, from the bits of the product.

    Args:
        x_MK: `[M, K]` bf16 or fp32.
        paired: write columns j and 64 + j of a block side by side, as `fp8_linear` keeps weights.

    Returns:
        Codes `[M, B * 128]` E4M3 (zeros behind column K) and scales `[M, B]` fp32.
    """
    blocks = F.pad(x_MK.float(), (0, -x_MK.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale_of(blocks.abs().amax(-1, keepdim=True))
    codes = (blocks / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
    if paired:
        halves = codes.view(torch.uint8).unflatten(-1, (2, 64)).transpose(-1, -2)
        codes = halves.flatten(-2).contiguous().view(torch.float8_e4m3fn)
    return codes.flatten(1), scale.squeeze(-1)


@Kernel
def round_fp8(x_MK: Tensor) -> Tensor:
    """Round like `act_quant` and back: `[M, K]` in the dtype of `x_MK`."""
    codes, scale = act_quant.reference(x_MK)
    value: Tensor = codes.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)
    return value.flatten(1)[:, : x_MK.shape[1]].to(x_MK.dtype)


def _scale_of(amax: Tensor) -> Tensor:
    """Smallest power of two that brings `amax` to at most 448."""
    bits = (amax.clamp_min(LEAST) * (1.0 / MOST)).view(torch.int32)
    scale: Tensor = (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)
    return scale


@jit
def to_grid(value):
    """Nearest E4M3 value, ties to even, of `|value| <= 448`, still in fp32.

    Triton's interpreter cuts off where its conversion should round; of a value on the grid it is exact.
    """
    exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
    magic = ((exponent + 20) << 23).to(tl.float32, bitcast=True) * 1.5
    return tl.where(value < 0, -((magic - value) - magic), (magic + value) - magic)


@jit
def _kernel(
    x, codes, scales, M, K: tl.constexpr, B: tl.constexpr, PAIRED: tl.constexpr,
    BACK: tl.constexpr, CUTS: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """One block of 128 columns of ROWS rows; BACK writes the rounded values over `codes`."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, j = tl.program_id(1), tl.arange(0, 128)
    column = block * 128 + j
    if PAIRED:  # place j is written; it holds column (j % 2) * 64 + j // 2
        column = block * 128 + (j % 2) * 64 + j // 2
    kept = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * K + column[None, :], mask=kept, other=0.0)
    value = value.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(value), 1), 1e-4)
    bits = (amax * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = clamped(value * inverse[:, None], -448.0, 448.0)
    if CUTS:
        scaled = to_grid(scaled)
    code = scaled.to(tl.float8e4nv)
    if BACK:
        value = code.to(tl.float32) * scale[:, None]
        where = codes + row.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(where, value.to(codes.dtype.element_ty), mask=kept)
    else:
        where = codes + row.to(tl.int64)[:, None] * (B * 128) + (block * 128 + j)[None, :]
        tl.store(where, code, mask=(row < M)[:, None])
        tl.store(scales + row.to(tl.int64) * B + block, scale, mask=row < M)


def _launch(x: Tensor, codes: Tensor, scales: Tensor, paired: bool, back: bool) -> None:
    rows, columns = x.shape
    blocks = triton.cdiv(columns, BLOCK)
    if rows:
        _kernel[(triton.cdiv(rows, _ROWS), blocks)](
            x,
            codes,
            scales,
            rows,
            columns,
            blocks,
            paired,
            back,
            INTERPRETED,
            _ROWS,
            num_warps=1,
            **early(),
        )


@act_quant.twin("triton", runs)
def _act_quant(x_MK: Tensor, paired: bool = False) -> tuple[Tensor, Tensor]:
    x, blocks = x_MK.contiguous(), triton.cdiv(x_MK.shape[1], BLOCK)
    codes = x.new_empty(x.shape[0], blocks * BLOCK, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], blocks, dtype=torch.float32)
    _launch(x, codes, scales, paired, False)
    return codes, scales


@round_fp8.twin("triton", runs)
def _round_fp8(x_MK: Tensor) -> Tensor:
    x = x_MK.contiguous()
    out = torch.empty_like(x)
    _launch(x, out, out, False, True)
    return out
