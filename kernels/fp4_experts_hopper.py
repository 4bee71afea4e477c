"""How the experts' products are cut on Hopper: `fp4_experts_gluon.py`, the same bits as `fp4_experts_triton.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.jit import on_hopper


class Cut(NamedTuple):
    """Outputs, warps and stages of a program; a stage is 256 columns. `together`: widen both blocks first."""

    outputs: int
    warps: int
    stages: int
    together: bool = False


# By the rows of a block; for others the plain kernels are as fast. Then of one token's blocks.
_CUTS = {16: Cut(128, 4, 2)}
_ALONE = Cut(64, 4, 3, True)


def cut_of(x: Tensor, stack: Fp4Stack, outputs: int, rows: int, alone: bool) -> Cut | None:
    """How to cut a product in blocks of so many rows; None where these kernels do not pay or cannot run.

    They take whole tiles and pairs of blocks of columns, in bf16; two pairs and more, as Triton fails to compile
    a loop of one turn.
    """
    pairs = stack.columns % 256 == 0 and stack.columns > 256
    whole = pairs and outputs % 128 == 0 and x.data_ptr() % 16 == 0
    if not (whole and x.dtype == torch.bfloat16 and on_hopper(x.device)):
        return None
    return _ALONE if alone else _CUTS.get(rows)
