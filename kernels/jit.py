"""Triton where it is installed; the same kernels run in its interpreter without a GPU.

`TRITON_INTERPRET=1` must be set before this is imported. There `tl.dot` multiplies the raw bits of
bf16 operands, so kernels upcast to fp32 before a product when `INTERPRETED` is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - the references are always there
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Launch option: leave products and sums as they are written. Which of them a compiler fuses differs
# between variants of a kernel, and with it the last bit; where it pays kernels say `tl.fma`.
FIXED = {"enable_fp_fusion": False}

__all__ = ["FIXED", "INTERPRETED", "jit", "on_hopper", "runs", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton to call it."""
    return function if triton is None else triton.jit(function)


def runs(device_type: str) -> bool:
    """Whether Triton kernels can run on tensors of this device type."""
    return triton is not None and (INTERPRETED if device_type == "cpu" else device_type == "cuda")


def on_hopper(device: torch.device) -> bool:
    """Whether kernels written for Hopper's units run on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
