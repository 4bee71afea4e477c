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

from whalepod.kernels.compiled import compiled, features, runs
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.simd import LANES, tile

# Sums of a tile stay in registers: 32 of 512 bits hold 4 x 4 vectors, 16 of 256 bits 4 x 1.
COLUMNS = 4 if "avx512f" in features() else 1
_STEP = LANES * COLUMNS

_half4, _half2, _half1 = (tile(rows, COLUMNS, True) for rows in (4, 2, 1))
_full4, _full2, _full1 = (tile(rows, COLUMNS, False) for rows in (4, 2, 1))
_thin_half4, _thin_half1 = tile(4, 1, True), tile(1, 1, True)
_thin_full4, _thin_full1 = tile(4, 1, False), tile(1, 1, False)


@compiled
def multiply_half(  # type: ignore[no-untyped-def]
    x, x_step, w, inputs, y, y_step, rows, outputs
):
    """`y = x W` for addresses of rows, of bf16 panels and of results; steps in bytes."""
    step = inputs * LANES * 2
    n = 0
    while n < outputs:
        at, to = w + n // LANES * step, y + n * 4
        m = 0
        if outputs - n > _STEP - LANES:
            while m + 4 <= rows:
                _half4(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
                m += 4
            if m + 2 <= rows:
                _half2(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
                m += 2
            if m < rows:
                _half1(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            n += _STEP
            continue
        while m + 4 <= rows:
            _thin_half4(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            m += 4
        while m < rows:
            _thin_half1(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            m += 1
        n += LANES


@compiled
def multiply_full(  # type: ignore[no-untyped-def]
    x, x_step, w, inputs, y, y_step, rows, outputs
):
    """As `multiply_half`, with fp32 panels."""
    step = inputs * LANES * 4
    n = 0
    while n < outputs:
        at, to = w + n // LANES * step, y + n * 4
        m = 0
        if outputs - n > _STEP - LANES:
            while m + 4 <= rows:
                _full4(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
                m += 4
            if m + 2 <= rows:
                _full2(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
                m += 2
            if m < rows:
                _full1(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            n += _STEP
            continue
        while m + 4 <= rows:
            _thin_full4(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            m += 4
        while m < rows:
            _thin_full1(x + m * x_step, x_step, at, step, inputs, to + m * y_step, y_step, outputs - n)
            m += 1
        n += LANES


@compiled
def multiply(x, x_step, w, half, inputs, y, y_step, rows, outputs):  # type: ignore[no-untyped-def]
    """`multiply_half` or `multiply_full`."""
    if half:
        multiply_half(x, x_step, w, inputs, y, y_step, rows, outputs)
    else:
        multiply_full(x, x_step, w, inputs, y, y_step, rows, outputs)


@compiled
def _grouped(  # type: ignore[no-untyped-def]
    x, x_step, group_step, w, half, groups, inputs, y, rows, outputs
):
    size = (outputs + LANES - 1) // LANES * LANES * inputs * (2 if half else 4)
    for g in range(groups):
        to = y + g * outputs * 4
        multiply(
            x + g * group_step, x_step, w + g * size, half, inputs, to, groups * outputs * 4, rows, outputs
        )


class Packed:
    """Panels of a `[..., N, K]` matrix: `address` of the first, and whether they are bf16."""

    __slots__ = ("address", "half", "data", "of", "version")

    def __init__(self, weight: Tensor, forget: Any) -> None:
        outputs, inputs = weight.shape[-2:]
        padded = F.pad(weight.detach(), (0, 0, 0, -outputs % LANES))
        panels = padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()
        narrow = panels.bfloat16()
        self.half = bool(torch.equal(narrow.float(), panels))
        self.data = narrow if self.half else panels
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
    """Whether compiled code may read these: fp32, in memory, and nobody asks for gradients."""
    return all(
        t.dtype is torch.float32 and t.device.type == "cpu" and not t.requires_grad for t in tensors
    )


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
        x_MK.data_ptr(), x_step, w.address, w.half, inputs, y_MN.data_ptr(), outputs * 4, rows, outputs
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
