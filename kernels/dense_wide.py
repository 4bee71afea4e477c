"""Launch products of very many rows with FP8 matrices: widened to bf16 first, once for all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.jit import INTERPRETED, triton
from whalepod.kernels.overlap import early

# From so many rows on, writing the values and reading them again costs less than widening in every
# tile. Tiles are (outputs, rows, columns, warps, stages).
LEAST_ROWS = 768
_WIDEN_ROWS = 64
_LARGE, _SMALL = (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)


def pays(x: Tensor, columns: int) -> bool:
    """Whether `product` should be used for `[M, ...]` inputs."""
    known = x.dtype == torch.bfloat16 or INTERPRETED
    hopper = INTERPRETED or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return bool(x.shape[0] >= LEAST_ROWS and columns % 128 == 0 and known and hopper)


def product(
    x: Tensor, w: Tensor, w_scales: Tensor, outputs: int, columns: int, groups: int, chunk: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `dense` of the kind "fp8" with bf16 inputs: the same bits.

    Args:
        x: `[M, G, K]` or `[M, K]`; K a multiple of 128. w: `[G, B, N, 64]` int16.
        chunk: blocks of 128 columns that are summed before they are added to others.
    """
    rows, blocks = x.shape[0], columns // 128
    wide = x.new_empty(groups * outputs, columns)
    widen_kernel[(triton.cdiv(outputs, _WIDEN_ROWS), blocks, groups)](
        w, w_scales, wide, N=outputs, BLOCKS=blocks, BN=_WIDEN_ROWS, EXACT=INTERPRETED,
        num_warps=4, **early(),
    )  # fmt: skip
    enough = triton.cdiv(rows, 256) * triton.cdiv(outputs, 128) * groups >= 264
    n, m, k, warps, stages = _LARGE if enough else _SMALL
    out = x.new_empty(rows, groups * outputs, dtype=dtype)
    wide_kernel[(triton.cdiv(rows, m) * triton.cdiv(outputs, n), groups)](
        TensorDescriptor.from_tensor(x.view(rows, groups * columns), [m, k]),
        TensorDescriptor.from_tensor(wide, [n, k]), out, rows, N=outputs, BLOCKS=blocks,
        GROUPS=groups, CHUNK=chunk, BN=n, BM=m, BK=k, EXACT=INTERPRETED, num_warps=warps,
        num_stages=stages, **early(),
    )  # fmt: skip
    return out


if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from whalepod.kernels.dense_wide_triton import wide_kernel, widen_kernel
