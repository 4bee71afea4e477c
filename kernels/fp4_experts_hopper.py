"""Launch the experts' products on Hopper: `fp4_experts_gluon.py`, the same bits as `fp4_experts_triton.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.jit import on_hopper, triton


class Cut(NamedTuple):
    """Outputs, warps and stages of a program; a stage is 256 columns. `together`: widen both blocks first."""

    outputs: int
    warps: int
    stages: int
    together: bool = False


_CUTS = {16: Cut(128, 4, 2)}
_ALONE = Cut(64, 4, 3, True)


def cut_of(rows: int, alone: bool) -> Cut | None:
    """How to cut blocks of so many rows; None where these kernels do not pay."""
    return _ALONE if alone else _CUTS.get(rows)


def runs(x: Tensor, stack: Fp4Stack, outputs: int) -> bool:
    """Whether the kernels take these operands: whole tiles and pairs of blocks of columns, in bf16."""
    whole = stack.columns % 256 == 0 and outputs % 128 == 0
    return on_hopper(x.device) and x.dtype == torch.bfloat16 and whole and x.data_ptr() % 16 == 0


def gate_up(
    blocks: int, x: Tensor, w13: Fp4Stack, weights: Tensor, way: tuple[Tensor | None, ...],
    out: Tensor, cut: Cut, sizes: dict[str, Any],
) -> None:  # fmt: skip
    """As `fp4_experts.gate_up`."""
    programs = 2 * out.shape[1] // cut.outputs
    gate_up_kernel[(programs * blocks,)](
        x, w13.codes, w13.scales, w13.gain, weights, *way, out, WIDTH=out.shape[1],
        COLUMNS=w13.columns, TILES=programs, BN=cut.outputs, STAGES=cut.stages,
        TOGETHER=cut.together, num_warps=cut.warps, **sizes,
    )  # fmt: skip


def down(
    blocks: int, inner: Tensor, w2: Fp4Stack, way: tuple[Tensor | None, ...], out: Tensor, cut: Cut,
    sizes: dict[str, Any],
) -> None:  # fmt: skip
    """As `fp4_experts.down`."""
    programs = w2.rows // cut.outputs
    down_kernel[(programs * blocks,)](
        inner, w2.codes, w2.scales, w2.gain, *way, out, D=w2.rows, COLUMNS=w2.columns,
        TILES=programs, BN=cut.outputs, STAGES=cut.stages, TOGETHER=cut.together,
        num_warps=cut.warps, **sizes,
    )  # fmt: skip


if triton is not None:
    from whalepod.kernels.fp4_experts_gluon import down_kernel, gate_up_kernel
