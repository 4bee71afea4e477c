"""`overlap.begin` for kernels in Gluon, and what its versions call by other names."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton 3.7 has renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def begin(EARLY: gl.constexpr, ALONGSIDE: gl.constexpr = False):
    """As `overlap.begin`."""
    if EARLY:
        if ALONGSIDE:
            if gl.program_id(0) == gl.num_programs(0) - 1:
                gdc_wait()
        else:
            gdc_wait()
        gdc_launch_dependents()
