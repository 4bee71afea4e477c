"""Launch products with dense matrices on Hopper: `dense_gluon.py`, the same bits as `dense_triton.py`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from whalepod.kernels.jit import on_hopper, triton
from whalepod.kernels.overlap import early

Kind = Literal["fp8", "quant", "bf16"]
Scales = tuple[Tensor, Tensor]

_PROCESSORS = 132
_FILL = 90  # programs that occupy a GPU if each needs all of a processor
# Programs so few that parts pay for up to 256 rows, whose sums are written and read again; not in FP8.
_FEWER = 48
_LONG = 4096  # columns that are too many for one program after the other, where few programs are
# Likewise of two warp groups that share inputs, by their rows, whole and in parts.
_WIDE_FILL = {64: (200, 200), 128: (96, 100)}
_QUANT_ROWS = 256  # beyond them the plain kernel's large tiles pay


class Cut(NamedTuple):
    """Outputs, rows, warps and stages of a program; whether chunks have programs of their own; columns of a stage."""

    outputs: int
    rows: int
    warps: int
    stages: int
    apart: bool
    span: int = 128


def runs(x: Tensor, w: Tensor, kind: Kind, columns: int, groups: int) -> bool:
    """Whether the bulk engine can read these operands: rows that begin at multiples of 16 bytes."""
    if not on_hopper(x.device) or x.dtype == torch.float32 or x.data_ptr() % 16 + w.data_ptr() % 16:
        return False
    if kind == "quant":
        return x.shape[0] <= _QUANT_ROWS
    return columns % 128 == 0 or (groups == 1 and columns % 8 == 0)


def cut_of(kind: Kind, rows: int, outputs: int, columns: int, groups: int, chunks: int) -> Cut:
    """How to cut a product, as measured with the matrices of V4-Flash on one H200."""
    if rows <= 32:
        stages = 4 if rows <= 16 and kind != "bf16" else 3
        return Cut(64, 16 if rows <= 16 else 32, 4, stages, chunks > 1)
    tall = 64 if rows <= 64 else 128

    def programs(n: int, m: int) -> int:
        return -(-outputs // n) * -(-rows // m) * groups

    few = programs(64, tall) < _FILL
    fewer = rows <= 128 or (kind != "fp8" and rows <= 256 and programs(64, 128) <= _FEWER)
    # Square tiles may be enough without parts, where they are not too long.
    fills = kind == "fp8" and columns < 2 * _LONG and programs(64, 64) >= _FILL and rows > 64
    apart = few and fewer and not fills and chunks > 1 and columns >= _LONG
    many = programs(128, tall) * (chunks if apart else 1)
    if kind == "bf16" and not apart and many > 2 * _PROCESSORS:
        if rows > 128 and -rows % 256 < 128 and chunks == 1 and programs(128, 256) >= _FILL:
            return Cut(128, 256, 8, 4, False, 64)
        return Cut(128, tall, 8, 2 if tall == 64 else 3, False)
    if kind == "fp8" and many >= _WIDE_FILL[tall][apart]:
        deep = 3 if tall == 64 else 2 if chunks == 1 else 4
        return Cut(128, tall, 8, deep, apart)
    square = few and not (kind == "fp8" and programs(64, 64) > _PROCESSORS)
    if kind != "quant" and tall == 128 and (apart or not square):
        alone = programs(64, 128) * (chunks if apart else 1) <= _PROCESSORS
        return Cut(64, 128, 4, 2 if not alone else 4 if kind == "fp8" else 3, apart)
    return Cut(64, 64, 4, 3 if kind == "bf16" else 4, apart)


def shared_bytes(kind: Kind, cut: Cut) -> int:
    """What a program keeps of weights and inputs."""
    weights, inputs = {"fp8": (1, 2), "quant": (1, 1), "bf16": (2, 2)}[kind]
    return cut.stages * cut.span * (cut.outputs * weights + cut.rows * inputs)


def room_of(columns: int) -> int:
    """Room for a scale of each block of columns."""
    return max(16, int(triton.next_power_of_2(-(-columns // 128))))


def registers(kind: Kind, cut: Cut) -> dict[str, int]:
    """A bound where two programs of eight warps fit a processor, if 128 registers a thread are all they need."""
    return {"maxnreg": 128} if (kind, cut.warps, cut.stages) == ("fp8", 8, 2) else {}


def launch(
    grid: tuple[int, int, int],
    x: Tensor,
    w: Tensor,
    scales: Scales,
    rest: tuple[Any, ...],
    kind: Kind,
    cut: Cut,
    columns: int,
) -> None:
    """As `dense_triton.dense_kernel[grid](x, scales[0], w, scales[1], *rest)`."""
    wide = 128 if w.dtype == torch.float8_e4m3fn else 64
    x = x.view(x.shape[0], -1)
    rows = w.view(-1, x.shape[1] if w.dtype == torch.bfloat16 else w.shape[-1])
    dense_kernel[grid](
        _read_by(x, cut.rows, wide), scales[0], _read_by(rows, cut.outputs, wide), scales[1],
        *rest, STAGES=cut.stages, SPAN=cut.span, ROOM=room_of(columns), num_warps=cut.warps,
        **registers(kind, cut), **early(),
    )  # fmt: skip


def _read_by(rows: Tensor, tall: int, wide: int) -> Any:
    """A descriptor of `[R, C]` rows, read `[tall, wide]` at a time."""
    bits = rows.element_size() * 8
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return TensorDescriptor.from_tensor(rows, [tall, wide], layout)


if triton is not None:
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from whalepod.kernels.dense_gluon import dense_kernel
