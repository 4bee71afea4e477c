"""All-to-all of bytes by messages between pairs, for fabrics whose messages find their way by tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

# Tags of the lanes, beyond those that single messages use (`engine/legs.py`).
_FIRST_TAG = 90


class Work(Protocol):
    """A send or a receive under way."""

    def wait(self) -> None:
        """Block until it is done. Raises EpochLost."""
        ...


class Pairs(Protocol):
    """What is needed of a fabric."""

    rank: int

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        """See `Fabric.send`."""
        ...

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        """See `Fabric.recv`."""
        ...


class Works:
    """Several under way as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all. Raises EpochLost."""
        for work in self._works:
            work.wait()


def all_to_all_by_pairs(
    fabric: Pairs, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
) -> Works:
    """Start what `Fabric.all_to_all` says; edges without bytes are left out."""
    incoming, outgoing = out.split(list(come)), data.split(list(go))
    tag, peers = _FIRST_TAG + lane, [p for p in range(len(come)) if p != fabric.rank]
    incoming[fabric.rank].copy_(outgoing[fabric.rank])
    works = [fabric.recv(incoming[p], p, tag) for p in peers if come[p]]
    works += [fabric.send(outgoing[p], p, tag) for p in peers if go[p]]
    return Works(works)
