"""Compiled twins of `linear` and `grouped_linear`.

A matrix is laid out in panels of 16 outputs once, in the narrowest of three types that
loses nothing: FP8 (E5M2, which holds FP4 weights with their power-of-two scales), bf16 (FP8
weights with theirs), fp32. Every output is one chain of
fused multiply-adds over the inputs in order, so no row depends on how many there are.

Legend: M rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.compiled import compiled, entry, features, runs
from whalepod.kernels.linear import grouped_linear, linear
from whalepod.kernels.simd import LANES, load_bf16, load_e5m2, store
from whalepod.kernels.tiles import sweep

# Sums of a tile stay in registers: 32 of 512 bits, or 16 of 256 bits, which are half a vector.
_WIDE = "avx512f" in features()
COLUMNS = 4 if _WIDE else 1
_ROWS, _THIN_ROWS = ((6, 4, 2, 1), (12, 8, 4, 2, 1)) if _WIDE else ((4, 2, 1), (4, 2, 1))
_STEP = LANES * COLUMNS
_wide1, _wide2, _wide4 = (sweep(_ROWS, COLUMNS, size) for size in (1, 2, 4))
_pair1, _pair2, _pair4 = (sweep(_THIN_ROWS, 2, size) for size in (1, 2, 4))
_thin1, _thin2, _thin4 = (sweep(_THIN_ROWS, 1, size) for size in (1, 2, 4))


# Narrow weights are widened for every tile of rows: from `_MANY` rows on, tiles of more rows and fewer
# columns make that cheaper, and from `WIDENED_ROWS` on they are widened once, into memory.
_MANY, WIDENED_ROWS = (8, 24) if _WIDE else (1 << 60, 8)


@compiled
def widen(w, size, numbers, room):
    """Write panels as fp32."""
    for i in range(0, numbers, LANES):
        if size == 1:
            store(room + i * 4, load_e5m2(w + i))
        else:
            store(room + i * 4, load_bf16(w + i * 2))


@entry()
def multiply(x, x_step, w, size, inputs, y, y_step, rows, outputs, room):
    """`y = x W` for addresses of rows, of panels (`size` bytes a weight), of results and of room.

    `room` takes `inputs * COLUMNS * LANES` numbers; with 0 nothing is widened beforehand.
    """
    step = inputs * LANES * size
    once = size != 4 and room and rows >= WIDENED_ROWS
    few = size != 4 and not once and rows >= _MANY
    n = 0
    while n < outputs:
        at, to, left = w + n // LANES * step, y + n * 4, outputs - n
        some = COLUMNS if left > _STEP - LANES and not few else 2 if left > LANES else 1
        of, apart = size, step
        if once:
            widen(at, size, some * inputs * LANES, room)
            at, of, apart = room, 4, inputs * LANES * 4
        if some == COLUMNS:
            if of == 1:
                _wide1(x, x_step, at, apart, inputs, to, y_step, rows, left)
            elif of == 2:
                _wide2(x, x_step, at, apart, inputs, to, y_step, rows, left)
            else:
                _wide4(x, x_step, at, apart, inputs, to, y_step, rows, left)
        elif some == 2:
            if of == 1:
                _pair1(x, x_step, at, apart, inputs, to, y_step, rows, left)
            elif of == 2:
                _pair2(x, x_step, at, apart, inputs, to, y_step, rows, left)
            else:
                _pair4(x, x_step, at, apart, inputs, to, y_step, rows, left)
        else:
            if of == 1:
                _thin1(x, x_step, at, apart, inputs, to, y_step, rows, left)
            elif of == 2:
                _thin2(x, x_step, at, apart, inputs, to, y_step, rows, left)
            else:
                _thin4(x, x_step, at, apart, inputs, to, y_step, rows, left)
        n += some * LANES


_FP32 = torch.float32


class Packed:
    """Panels of a `[..., N, K]` matrix: `address` of the first, and bytes of a weight."""

    __slots__ = ("address", "data", "of", "size", "version")

    def __init__(self, weight: Tensor, forget: Any) -> None:
        padded = F.pad(weight.detach(), (0, 0, 0, -weight.shape[-2] % LANES))
        panels = padded.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()
        self.size, self.data = 4, panels
        for dtype in (torch.float8_e5m2, torch.bfloat16):
            narrow = panels.to(dtype)
            if torch.equal(narrow.float(), panels):
                self.size, self.data = narrow.element_size(), narrow
                break
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


def room_for(w: Packed, inputs: int, rows: int) -> Tensor | None:
    """Room to widen the panels of a tile's columns in, where that is done."""
    if w.size == 4 or rows < WIDENED_ROWS:
        return None
    return torch.empty(inputs * _STEP)


@linear.twin("compiled", runs)
def _linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    if not plain(x_MK, weight_NK):
        return linear.reference(x_MK, weight_NK)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    (rows, inputs), outputs, w = x_MK.shape, weight_NK.shape[0], packed(weight_NK)
    y_MN = torch.empty(rows, outputs)
    x_step = x_MK.stride(0) * 4
    room = room_for(w, inputs, rows)
    multiply(
        x_MK.data_ptr(),
        x_step,
        w.address,
        w.size,
        inputs,
        y_MN.data_ptr(),
        outputs * 4,
        rows,
        outputs,
        0 if room is None else room.data_ptr(),
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
    panels = -(-outputs // LANES) * LANES * inputs * w.size
    room = room_for(w, inputs, rows)
    place = 0 if room is None else room.data_ptr()
    for g in range(groups):
        multiply(
            *(x_MGK.data_ptr() + g * x_MGK.stride(1) * 4, x_MGK.stride(0) * 4),
            *(w.address + g * panels, w.size, inputs),
            *(y.data_ptr() + g * outputs * 4, groups * outputs * 4, rows, outputs, place),
        )
    return y
