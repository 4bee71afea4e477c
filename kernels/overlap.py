"""Start a kernel while the one before it still runs, so that launches cost less of a decode step.

A kernel begins with `begin(EARLY)`: it lets its successor start, then waits until everything before it
is done and visible. Every launch passes `**early()`. Needs Hopper or later; elsewhere nothing changes.
"""

from __future__ import annotations

from functools import cache

import torch

from whalepod.kernels.jit import INTERPRETED, jit, tl


@cache
def early() -> dict[str, bool]:
    """Keyword arguments of a launch."""
    able = not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


@jit
def begin(EARLY: tl.constexpr):
    """First statement of a kernel: before anything is read that another kernel writes."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
