"""Root-mean-square normalisation, weighted and unweighted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel


@Kernel
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square of the last dim, in fp32, then multiply by `weight`.

    Args:
        x: `[..., D]`, fp32 or bf16.
        weight: `[D]` fp32, or None for the unweighted norm of the query heads.
        eps: added to the mean square.

    Returns:
        `[..., D]` in the dtype of `x`; the only rounding to it comes after the weight.

    Source: DeepSeek-V4 inference/model.py, RMSNorm.
    """
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)
