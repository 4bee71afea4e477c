"""Tensors between the members of one epoch.

One fabric per rank and epoch. Messages are uint8; they match per (source, destination, tag) in
order. `docs/wire.md` says what travels. Failure semantics: a wait that cannot be fulfilled, because
the peer is gone, silent past the deadline, or has left the epoch, raises EpochLost; the caller then
closes its fabric, which wakes whoever waits for it in turn. (`nccl.py` says how waits on a GPU end.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from whalepod.cluster.exchange import Work, all_to_all_by_pairs
from whalepod.errors import EpochLost

__all__ = ["LANES", "Fabric", "TorchFabric", "Work", "exchange"]

LANES = 3


class Fabric(Protocol):
    """One rank's end of an epoch's transport.

    `together` says that messages cannot pass each other between two ranks, so that those of a leg have
    to leave and arrive in one call, `all_to_all` (NCCL); its works order what follows on the device and
    do not keep the host. A receive by `recv` may name more room than the message takes where it is
    False; bytes beyond the message stay as they were. `control` carries words of the host.
    """

    rank: int
    size: int
    epoch: int
    names: tuple[str, ...]
    kind: str
    together: bool

    @property
    def control(self) -> Fabric:
        """The fabric for tensors on the host; this one itself where its own are there."""
        ...

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        """Send a 1-D uint8 tensor; the fabric keeps it until it has left."""
        ...

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        """Ask for the next message of `src` under `tag`."""
        ...

    def all_to_all(
        self, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        """Exchange bytes with every rank at once; a rank with nothing to do may leave a call out.

        Args:
            lane: 0 to `LANES` - 1; calls of one lane match in order, lanes do not wait for each other.
            out: `[sum(come)]` uint8, from rank 0 first. data: `[sum(go)]`, for rank 0 first.
            come, go: bytes from and for each rank; both ends know them.
        """
        ...

    def check(self) -> None:
        """Raise EpochLost when this end is closed: what a device has read since may be anything."""
        ...

    def watch(self, working: bool) -> None:
        """Say that a step begins or has ended: one that outlasts the deadline closes the fabric."""
        ...

    def close(self) -> None:
        """Leave the epoch at once; idempotent, from any thread, never blocks for long."""
        ...


def exchange(
    fabric: Fabric, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None
) -> tuple[Tensor, list[int]]:
    """All-to-all of rows over every rank.

    Args:
        rows: `[sum(send_counts), row_bytes]` uint8, for rank 0 first.
        send_counts: rows for each rank.
        recv_counts: rows from each rank, or None to exchange the counts first. Edges without
            rows are skipped when both ends know it.

    Returns:
        `[sum(recv_counts), row_bytes]` from rank 0 first, and the counts.
    """
    width = rows.shape[1]
    if recv_counts is None:
        told = torch.tensor(send_counts, dtype=torch.int64).view(torch.uint8).to(rows.device)
        words = [8] * fabric.size
        heard = torch.empty_like(told)
        fabric.all_to_all(0, heard, told, words, words).wait()
        recv_counts = heard.cpu().view(torch.int64).tolist()
    out = torch.empty(sum(recv_counts), width, dtype=torch.uint8, device=rows.device)
    come, go = ([width * n for n in counts] for counts in (recv_counts, send_counts))
    fabric.all_to_all(0, out.view(-1), rows.reshape(-1), come, go).wait()
    return out, list(recv_counts)


class _TorchWork:
    """A c10d work, with the peer's name for the error."""

    def __init__(self, fabric: TorchFabric, work: Work | None, peer: int, keep: Tensor) -> None:
        self._fabric, self._work, self._peer, self._keep = fabric, work, peer, keep

    def wait(self) -> None:
        """Block; a failure closes the fabric, so that peers waiting for this rank wake too."""
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            self._work = None
            raise self._fabric.lost(self._peer, error) from None
        self._work = None


class _SelfWork:
    """A receive from oneself."""

    def __init__(self, fabric: TorchFabric, buffer: Tensor, tag: int) -> None:
        self._fabric, self._buffer, self._tag = fabric, buffer, tag

    def wait(self) -> None:
        """Copy the oldest message of this tag."""
        message = self._fabric.own[self._tag].pop(0)
        self._buffer[: message.numel()] = message


class TorchFabric:
    """Point-to-point over a c10d process group of its own; the default group is never touched.

    Args:
        group: a `ProcessGroupGloo` over all members of the epoch.
    """

    kind, together = "gloo", False

    def __init__(self, group: object, rank: int, names: Sequence[str], epoch: int) -> None:
        self._group: object | None = group
        self.rank, self.size, self.names, self.epoch = rank, len(names), tuple(names), epoch
        self.own: dict[int, list[Tensor]] = {}

    @property
    def control(self) -> TorchFabric:
        """The same: its tensors are the host's."""
        return self

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        """See `Fabric.send`."""
        if dst == self.rank:
            self.own.setdefault(tag, []).append(data)
            return _TorchWork(self, None, dst, data)
        return self._start("send", data, dst, tag)

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        """See `Fabric.recv`."""
        if src == self.rank:
            return _SelfWork(self, buffer, tag)
        return self._start("recv", buffer, src, tag)

    def all_to_all(
        self, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        """See `Fabric.all_to_all`."""
        return all_to_all_by_pairs(self, lane, out, data, come, go)

    def check(self) -> None:
        """See `Fabric.check`."""
        if self._group is None:
            raise EpochLost(self.epoch, [self.names[self.rank]], "its fabric is closed")

    def watch(self, working: bool) -> None:
        """Waits have a deadline of their own."""

    def close(self) -> None:
        """Drop the group; its sockets close with the last reference."""
        self._group = None

    def lost(self, peer: int, error: Exception) -> EpochLost:
        """Close, and say whose silence it was."""
        self.close()
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return EpochLost(self.epoch, [self.names[peer]], first[:160])

    def _start(self, operation: str, data: Tensor, peer: int, tag: int) -> Work:
        group = self._group
        if group is None:
            raise EpochLost(self.epoch, [self.names[self.rank]], "its fabric is closed")
        try:
            return _TorchWork(self, getattr(group, operation)([data], peer, tag), peer, data)
        except RuntimeError as error:
            raise self.lost(peer, error) from None
