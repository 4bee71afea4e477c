"""Matrices as they are stored, and products with them.

A GPU keeps FP8 matrices as the checkpoint has them; elsewhere they are wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whalepod.kernels.fp8_linear import BLOCK, Fp8Matrix, fp8_linear
from whalepod.kernels.linear import linear
from whalepod.model.fidelity import Fidelity

Matrix = Tensor | Fp8Matrix
# Tensors and matrices by official name.
Weights = Mapping[str, Any]


class Product:
    """Matrices `[N, K]` with the same input, as one product where their storage allows.

    Args:
        matrices: their outputs stand side by side in this order.
        fidelity: `released` rounds inputs to FP8, as the weights were trained for.
    """

    def __init__(self, matrices: Sequence[Matrix], fidelity: Fidelity) -> None:
        self.fidelity, self.matrices = fidelity, joined(matrices)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """`[M, sum of N]` in the dtype of `x_MK`."""
        wide = None
        made = []
        for matrix in self.matrices:
            if isinstance(matrix, Fp8Matrix):
                made.append(fp8_linear(x_MK, matrix, self.fidelity.released))
                continue
            wide = self.fidelity.linear_input(x_MK) if wide is None else wide
            made.append(linear(wide, matrix))
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def joined(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Put neighbours of the same kind one above the other; scale tiles must not be cut."""
    out: list[Matrix] = []
    for one in matrices:
        before = out[-1] if out else None
        if isinstance(one, Tensor) and isinstance(before, Tensor):
            out[-1] = torch.cat([before, one])
        elif (
            isinstance(one, Fp8Matrix)
            and isinstance(before, Fp8Matrix)
            and before.rows % BLOCK == 0
            and before.groups == one.groups
        ):
            out[-1] = Fp8Matrix(
                torch.cat([before.codes, one.codes], dim=2),
                torch.cat([before.scales, one.scales], dim=2),
                one.columns,
            )
        else:
            out.append(one)
    return out
