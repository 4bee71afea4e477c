"""The compiled CPU twins; importing this registers them."""

from whalepod.kernels import linear_cpu

__all__ = ["linear_cpu"]
