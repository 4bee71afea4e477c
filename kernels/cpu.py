"""The compiled CPU twins; importing this registers them."""

from whalepod.kernels import experts_cpu, hyper_cpu, linear_cpu

__all__ = ["experts_cpu", "hyper_cpu", "linear_cpu"]
