"""Start a kernel while the one before it still runs, so that launches cost less of a decode step.

A kernel begins with `begin(EARLY)`: it waits until everything before it is done and visible, then lets its
successor start, which waits in turn. The other way round, successors of successors would start, too, and
their programs lie where those of the next kernel belong. Before it waits, a kernel reads weights, which no
kernel of a step writes, and what the kernel before it has waited for itself (`fp4_experts_gluon.py`), nothing
else. Every launch passes `**early()`, or `**LATE` where programs that came early would lie crowded together: it
starts when all before it is done, and so may let its successor start at once. Of two kernels in a row that need
nothing of each other the second passes `ALONGSIDE=True`. Needs Hopper or later; elsewhere nothing changes.
"""

from __future__ import annotations

from functools import cache

import torch

from whalepod.kernels.jit import INTERPRETED, jit, tl

# Whether kernels and branches of graphs overlap; off shows what each kernel takes by itself.
overlapping = True
# Keyword arguments of a launch that starts when the kernel before it is done.
LATE = {"EARLY": False}


@cache
def _able() -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)


def early() -> dict[str, bool]:
    """Keyword arguments of a launch."""
    return {"EARLY": True, "launch_pdl": True} if overlapping and _able() else LATE


@jit
def begin(EARLY: tl.constexpr, ALONGSIDE: tl.constexpr = False):
    """First statement of a kernel: before anything is read that another kernel writes.

    ALONGSIDE: the kernel before this one began with it, too, and neither needs the other. Once this one's
    programs start, all of that one's have, so that whatever they waited for is done. The last program waits
    for that kernel, for whoever waits for this one.
    """
    if EARLY:
        if ALONGSIDE:
            if tl.program_id(0) == tl.num_programs(0) - 1:
                tl.extra.cuda.gdc_wait()
        else:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
