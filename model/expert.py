"""A feed-forward expert: clamped SwiGLU between two matrices.

Legend: M rows, D hidden width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whalepod.kernels.linear import linear
from whalepod.kernels.swiglu import swiglu
from whalepod.model.fidelity import Fidelity
from whalepod.model.matrix import Matrix, Product, Weights


class PackedExpert:
    """One expert over matrices as they are stored: the shared one on a GPU.

    Args: as of `Expert`.
    """

    def __init__(
        self, w1: Matrix, w2: Matrix, w3: Matrix, limit: float, fidelity: Fidelity
    ) -> None:
        self.up, self.down = Product([w1, w3], fidelity), Product([w2], fidelity)
        self.limit = limit

    def __call__(self, x_MD: Tensor, weight_M: Tensor | None = None) -> Tensor:
        """As `Expert`."""
        return self.down(swiglu(self.up(x_MD), self.limit, weight_M))


class Expert:
    """One expert's weights; routed and shared experts differ only in the row weight.

    Args:
        w1: `[I, D]` gate projection. w3: `[I, D]` up projection. w2: `[D, I]` down projection.
        limit: `swiglu_limit` of the model.
    """

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], prefix: str, limit: float, fidelity: Fidelity
    ) -> Expert:
        """Take `{prefix}.w1/w2/w3.weight` from `weights`."""
        w1, w2, w3 = (weights[f"{prefix}.{w}.weight"] for w in ("w1", "w2", "w3"))
        return cls(w1, w2, w3, limit, fidelity)

    def __init__(
        self, w1: Tensor, w2: Tensor, w3: Tensor, limit: float, fidelity: Fidelity
    ) -> None:
        self.w13, self.w2 = torch.cat([w1, w3]), w2
        self.kept: object = None  # see `kernels.experts.Matrices`
        self.limit, self.fidelity = limit, fidelity

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return self.w13.nbytes + self.w2.nbytes

    def __call__(self, x_MD: Tensor, weight_M: Tensor | None = None) -> Tensor:
        """Return `[M, D]` in the dtype of `x_MD`.

        The routing weight is applied before the down projection, as the release does.
        """
        gate_up = linear(self.fidelity.linear_input(x_MD), self.w13)
        inner = swiglu(gate_up, self.limit, weight_M)
        return linear(self.fidelity.linear_input(inner), self.w2)


def shared_expert(
    weights: Weights, prefix: str, limit: float, fidelity: Fidelity
) -> Expert | PackedExpert:
    """The expert of `{prefix}.w1/w2/w3.weight`, however they are stored."""
    w1, w2, w3 = (weights[f"{prefix}.{w}.weight"] for w in ("w1", "w2", "w3"))
    kind = Expert if all(isinstance(w, Tensor) for w in (w1, w2, w3)) else PackedExpert
    return kind(w1, w2, w3, limit, fidelity)
