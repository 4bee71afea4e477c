"""The fabric between threads of one process: queues instead of a network."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from whalepod.cluster.exchange import Work, all_to_all_by_pairs
from whalepod.errors import EpochLost


class _Board:
    """Mail of all ranks: FIFO per (src, dst, tag)."""

    def __init__(self, size: int) -> None:
        self.changed = [threading.Condition() for _ in range(size)]
        self.boxes: list[dict[tuple[int, int], deque[Tensor]]] = [{} for _ in range(size)]
        self.closed: set[int] = set()


class _Done:
    def wait(self) -> None:
        """Nothing is left to do."""


class _Receipt:
    """A message asked for; matched when it is waited for, in that order."""

    def __init__(self, fabric: LocalFabric, buffer: Tensor, src: int, tag: int) -> None:
        self._fabric, self._buffer, self._src, self._tag = fabric, buffer, src, tag

    def wait(self) -> None:
        """Block until the message is here and copy it."""
        message = self._fabric.take(self._src, self._tag)
        if message.numel() > self._buffer.numel():
            raise EpochLost(
                self._fabric.epoch,
                [self._fabric.names[self._src]],
                f"a message of {message.numel()} bytes came where {self._buffer.numel()} fit",
            )
        self._buffer[: message.numel()] = message


class LocalFabric:
    """One thread's end. See `fabric.Fabric` for the contract."""

    kind, together = "local", False

    def __init__(
        self, board: _Board, rank: int, names: Sequence[str], epoch: int, deadline_s: float
    ) -> None:
        self._board, self.rank, self.names = board, rank, tuple(names)
        self.size, self.epoch, self._deadline_s = len(names), epoch, deadline_s

    @property
    def control(self) -> LocalFabric:
        """The same: its tensors are the host's."""
        return self

    def all_to_all(
        self, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        """See `Fabric.all_to_all`."""
        return all_to_all_by_pairs(self, lane, out, data, come, go)

    def check(self) -> None:
        """See `Fabric.check`."""
        self._check(self.rank)

    def watch(self, working: bool) -> None:
        """Waits have a deadline of their own."""

    def send(self, data: Tensor, dst: int, tag: int) -> _Done:
        """Copy a message into the peer's box; refuses when either end is closed."""
        self._check(dst)
        box = self._board.boxes[dst]
        with self._board.changed[dst]:
            box.setdefault((self.rank, tag), deque()).append(data.clone())
            self._board.changed[dst].notify_all()
        return _Done()

    def recv(self, buffer: Tensor, src: int, tag: int) -> _Receipt:
        """Ask for the next message of `src` under `tag`."""
        return _Receipt(self, buffer, src, tag)

    def take(self, src: int, tag: int) -> Tensor:
        """Wait for a message. Raises EpochLost when the peer closes or the deadline passes."""
        box, end = self._board.boxes[self.rank], time.monotonic() + self._deadline_s
        changed = self._board.changed[self.rank]
        with changed:
            while not box.get((src, tag)):
                self._check(src)
                left = end - time.monotonic()
                if left <= 0:
                    raise EpochLost(
                        self.epoch, [self.names[src]], f"no message within {self._deadline_s} s"
                    )
                changed.wait(left)
            return box[src, tag].popleft()

    def close(self) -> None:
        """Leave; every peer that waits for this rank wakes up."""
        self._board.closed.add(self.rank)
        for condition in self._board.changed:
            with condition:
                condition.notify_all()

    def _check(self, peer: int) -> None:
        if self.rank in self._board.closed:
            raise EpochLost(self.epoch, [self.names[self.rank]], "its fabric is closed")
        if peer in self._board.closed:
            raise EpochLost(self.epoch, [self.names[peer]], "its fabric is closed")


def local_fabrics(
    names: Sequence[str], *, epoch: int = 1, deadline_s: float = 20.0
) -> list[LocalFabric]:
    """One fabric a name, joined."""
    board = _Board(len(names))
    return [LocalFabric(board, rank, names, epoch, deadline_s) for rank in range(len(names))]
