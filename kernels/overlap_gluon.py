"""`overlap.begin` for kernels in Gluon, and what its versions call by other names."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton 3.7 has renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def begin(EARLY: gl.constexpr):
    """First statement of a kernel: before anything is read that another kernel writes."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
