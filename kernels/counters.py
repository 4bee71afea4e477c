"""Counters for kernels whose last program to finish does what needs all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.beside import lane

_LEAST = 1024
_known: dict[tuple[torch.device, int, int], Tensor] = {}
_last: dict[tuple[torch.device, int], list[Tensor]] = {}


def zeros(device: torch.device, count: int) -> Tensor:
    """Int32 counters that every launch finds and leaves at zero.

    There is a set for each stream, and for each of a graph's branches.

    Graphs take the set that was made last outside of them, as what is captured has run before: zeros
    that a capture makes would not be there when it breaks off. They are replayed one after the other.

    Raises:
        RuntimeError: nothing of this size has run before it is captured.
    """
    sets = _last.setdefault((device, lane()), [])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if not sets or len(sets[-1]) < count:
            raise RuntimeError(
                f"no {count} counters on {device}: run a kernel once before a capture"
            )
        return sets[-1]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _known.get((device, stream, lane()))
    if found is None or len(found) < count:
        found = torch.zeros(max(_LEAST, count), dtype=torch.int32, device=device)
        _known[device, stream, lane()] = found
        sets.append(found)  # all of them stay: graphs may hold on to one
    return found
