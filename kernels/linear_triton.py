"""Products with wide matrices on GPUs: a library would sum in another order for other row counts."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.dense import dense
from whalepod.kernels.jit import runs
from whalepod.kernels.linear import grouped_linear, linear, linear_wide


def _on_gpu(device_type: str) -> bool:
    """The interpreter would take minutes for what the reference does at once."""
    return device_type == "cuda" and runs(device_type)


def _product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != w.dtype:  # every bf16 number is an fp32 one
        x, w = x.float(), w.float()
    return dense(x.contiguous(), None, w.contiguous(), None, "bf16", w.shape[0], w.shape[1], dtype)


@linear.twin("triton", _on_gpu)
def _linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return _product(x_MK, weight_NK, x_MK.dtype)


@linear_wide.twin("triton", _on_gpu)
def _linear_wide(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return _product(x_MK, weight_NK, torch.float32)


@grouped_linear.twin("triton", _on_gpu)
def _grouped_linear(x_MGK: Tensor, weight_GNK: Tensor) -> Tensor:
    parts = [_product(x_MGK[:, g], w, x_MGK.dtype) for g, w in enumerate(weight_GNK)]
    return torch.cat(parts, dim=1)
