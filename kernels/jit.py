"""Triton where it is installed; the same kernels run in its interpreter without a GPU.

`TRITON_INTERPRET=1` must be set before this is imported. There `tl.dot` multiplies the raw bits of
bf16 operands, so kernels upcast to fp32 before a product when `INTERPRETED` is set.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
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

__all__ = ["FIXED", "INTERPRETED", "jit", "on_hopper", "runs", "tl", "triton", "what_is_missing"]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton to call it."""
    return function if triton is None else triton.jit(function)


def runs(device_type: str) -> bool:
    """Whether Triton kernels can run on tensors of this device type."""
    return triton is not None and (INTERPRETED if device_type == "cpu" else device_type == "cuda")


def what_is_missing() -> str | None:
    """What Triton needs of a machine with a GPU and does not find: it compiles C where it runs."""
    if os.environ.get("WHALEPOD_KERNELS") == "torch":
        return None
    if triton is None:
        return "Triton is not installed: pip install 'whalepod[gpu]'"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        names = " or ".join(compilers)
        return f"Triton finds no C compiler ({names}): install gcc and libc6-dev, or set CC"
    # As Triton looks for them: Debian's own scheme names a folder that has none.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = os.path.join(sysconfig.get_path("include", scheme), "Python.h")
    if not os.path.exists(header):
        return f"Triton needs Python's headers, and there is no {header}: install python3-dev"
    return None


def on_hopper(device: torch.device) -> bool:
    """Whether kernels written for Hopper's units run on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
