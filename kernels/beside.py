"""Work of one graph that runs beside other work of it, where neither needs the other.

A decode step of few rows waits for launches and for its own chain of small results more than for the
memory, which then could serve another chain. Graphs keep the two as branches.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from whalepod.kernels import overlap

_side: dict[torch.device, torch.cuda.Stream] = {}
_local = threading.local()


def lane() -> int:
    """Which branch launches now: what two kernels must not share is kept for each."""
    return getattr(_local, "lane", 0)


class Beside:
    """`with Beside(device) as branch: ...` launches beside what follows it, until `branch.join()`.

    Outside of a capture everything runs in the order of the program. What the branch reads must be held
    until it is joined, as memory that is given back serves whoever asks next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._apart = captured and overlap.overlapping
        self._done: torch.cuda.Event | None = None
        self._inside: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> Beside:
        """Launch on the branch from here on."""
        assert lane() == 0, "a branch has no branches"
        _local.lane = 1
        if self._apart:
            if self._device not in _side:
                _side[self._device] = torch.cuda.Stream(self._device)
            side = _side[self._device]
            side.wait_stream(torch.cuda.current_stream(self._device))
            self._inside = torch.cuda.stream(side)
        self._inside.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Launch on the graph's main way again."""
        _local.lane = 0
        if self._apart:
            self._done = torch.cuda.Event()
            self._done.record(_side[self._device])
        self._inside.__exit__(kind, error, trace)

    def join(self) -> None:
        """What is launched from here on finds the branch's work done."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = None
