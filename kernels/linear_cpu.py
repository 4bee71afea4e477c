"""Compiled twins of `linear` and `grouped_linear`.

A matrix is laid out in panels of 16 outputs once, in bf16 where that loses nothing (FP8 and FP4
weights with their power-of-two scales are bf16 numbers), else in fp32. Every output is one chain of
fused multiply-adds over the inputs in order, so no row depends on how many there are.

Legend: M rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.compiled import entry, features, runs
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.simd import LANES
from whalepod.kernels.tiles import sweep

# Sums of a tile stay in registers: 32 of 512 bits, or 16 of 256 bits, which are half a vector.
_WIDE = "avx512f" in features()
COLUMNS = 4 if _WIDE else 1
_ROWS, _THIN_ROWS = ((6, 4, 2, 1), (8, 4, 2, 1)) if _WIDE else ((4, 2, 1), (4, 2, 1))
_STEP = LANES * COLUMNS
_wide_half, _wide_full = sweep(_ROWS, COLUMNS, True), sweep(_ROWS, COLUMNS, False)
_pair_half, _pair_full = sweep(_THIN_ROWS, 2, True), sweep(_THIN_ROWS, 2, False)
_thin_half, _thin_full = sweep(_THIN_ROWS, 1, True), sweep(_THIN_ROWS, 1, False)


@entry()
def multiply(x, x_step, w, half, inputs, y, y_step, rows, outputs):  # type: ignore[no-untyped-def]
    """`y = x W` for addresses of rows, of panels (bf16 or fp32) and of results; steps in bytes."""
    step = inputs * LANES * (2 if half else 4)
    n = 0
    while n < outputs:
        at, to, left = w + n // LANES * step, y + n * 4, outputs - n
        if left > _STEP - LANES:
            if half:
                _wide_half(x, x_step, at, step, inputs, to, y_step, rows, left)
            else:
                _wide_full(x, x_step, at, step, inputs, to, y_step, rows, left)
            n += _STEP
        elif left > LANES:
            if half:
                _pair_half(x, x_step, at, step, inputs, to, y_step, rows, left)
            else:
                _pair_full(x, x_step, at, step, inputs, to, y_step, rows, left)
            n += 2 * LANES
        else:
            if half:
                _thin_half(x, x_step, at, step, inputs, to, y_step, rows, left)
            else:
                _thin_full(x, x_step, at, step, inputs, to, y_step, rows, left)
            n += LANES


@entry()
def _grouped(  # type: ignore[no-untyped-def]
    x, x_step, group_step, w, half, groups, inputs, y, rows, outputs
):
    size = (outputs + LANES - 1) // LANES * LANES * inputs * (2 if half else 4)
    for g in range(groups):
        to = y + g * outputs * 4
        multiply(
            x + g * group_step,
            x_step,
            w + g * size,
            half,
            inputs,
            to,
            groups * outputs * 4,
            rows,
            outputs,
        )


_FP32 = torch.float32


class Packed:
    """Panels of a `[..., N, K]` matrix: `address` of the first, and whether they are bf16."""

    __slots__ = ("address", "data", "half", "of", "version")

    def __init__(self, weight: Tensor, forget: Any) -> None:
        padded = F.pad(weight.detach(), (0, 0, 0, -weight.shape[-2] % LANES))
        panels = padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()
        narrow = panels.bfloat16()
        exact = torch.equal(narrow.float(), panels)
        self.half, self.data = (1, narrow) if exact else (0, panels)
        self.address = self.data.data_ptr()
        self.of = weakref.ref(weight, forget)
        self.version = None if weight.is_inference() else weight._version


_PACKED: dict[int, Packed] = {}


def packed(weight: Tensor) -> Packed:
    """Return a matrix's panels, made when they are first asked for and dropped with the matrix."""
    key = id(weight)
    found = _PACKED.get(key)
    if found is None or (found.version is not None and found.version != weight._version):
        found = _PACKED[key] = Packed(weight, lambda _: _PACKED.pop(key, None))
    return found


def plain(*tensors: Tensor) -> bool:
    """Whether compiled code may read these: fp32, on no GPU, and nobody asks for gradients."""
    for t in tensors:  # noqa: SIM110 - a generator takes three times as long, and this is hot
        if t.dtype is not _FP32 or t.requires_grad or t.is_cuda:
            return False
    return True


@linear.twin("compiled", runs)
def _linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    if not plain(x_MK, weight_NK):
        return linear.reference(x_MK, weight_NK)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    (rows, inputs), outputs, w = x_MK.shape, weight_NK.shape[0], packed(weight_NK)
    y_MN = torch.empty(rows, outputs)
    x_step = x_MK.stride(0) * 4
    multiply(
        x_MK.data_ptr(),
        x_step,
        w.address,
        w.half,
        inputs,
        y_MN.data_ptr(),
        outputs * 4,
        rows,
        outputs,
    )
    return y_MN


@grouped_linear.twin("compiled", runs)
def _grouped_linear(x_MGK: Tensor, weight_GNK: Tensor) -> Tensor:
    if not plain(x_MGK, weight_GNK):
        return grouped_linear.reference(x_MGK, weight_GNK)
    if x_MGK.stride(2) != 1:
        x_MGK = x_MGK.contiguous()
    (rows, groups, inputs), outputs = x_MGK.shape, weight_GNK.shape[1]
    w, y = packed(weight_GNK), torch.empty(rows, groups * outputs)
    steps = x_MGK.stride(0) * 4, x_MGK.stride(1) * 4
    _grouped(
        x_MGK.data_ptr(), *steps, w.address, w.half, groups, inputs, y.data_ptr(), rows, outputs
    )
    return y
