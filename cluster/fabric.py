"""Tensors between the members of one epoch.

One fabric per rank and epoch. Messages are uint8; they match per (source, destination, tag) in
order. `docs/wire.md` says what travels. Failure semantics: a wait that cannot be fulfilled, because
the peer is gone, silent past the deadline, or has left the epoch, raises EpochLost; the caller then
closes its fabric, which wakes whoever waits for it in turn.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from whalepod.cluster.local_fabric import LocalFabric, local_fabrics
from whalepod.errors import ConfigError, EpochLost

__all__ = [
    "Fabric",
    "LocalFabric",
    "Rendezvous",
    "TorchFabric",
    "Work",
    "exchange",
    "local_fabrics",
]


class Work(Protocol):
    """A send or a receive under way."""

    def wait(self) -> None:
        """Block until it is done. Raises EpochLost."""
        ...


class Fabric(Protocol):
    """One rank's end of an epoch's transport.

    `exact_sizes` says that a receive must name the message's very size (NCCL); where it is False
    a receive may name more, and bytes beyond the message stay as they were.
    """

    rank: int
    size: int
    epoch: int
    names: tuple[str, ...]
    kind: str
    exact_sizes: bool

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        """Send a 1-D uint8 tensor; the fabric keeps it until it has left."""
        ...

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        """Ask for the next message of `src` under `tag`."""
        ...

    def close(self) -> None:
        """Leave the epoch at once; idempotent, from any thread, never blocks for long."""
        ...


_EXCHANGE_TAG = 90


def exchange(
    fabric: Fabric, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None
) -> tuple[Tensor, list[int]]:
    """All-to-all of rows.

    Args:
        rows: `[sum(send_counts), row_bytes]` uint8, for rank 0 first.
        send_counts: rows for each rank.
        recv_counts: rows from each rank, or None to exchange the counts first. Edges without
            rows are skipped when both ends know it.

    Returns:
        `[sum(recv_counts), row_bytes]` from rank 0 first, and the counts.
    """
    peers, width = range(fabric.size), rows.shape[1]
    if recv_counts is None:
        ones = torch.tensor(send_counts, dtype=torch.int64).view(torch.uint8).view(-1, 8)
        got, _ = exchange(fabric, ones.to(rows.device), [1] * fabric.size, [1] * fabric.size)
        recv_counts = got.cpu().flatten().view(torch.int64).tolist()
    out = torch.empty(sum(recv_counts), width, dtype=torch.uint8, device=rows.device)
    incoming = list(out.split(list(recv_counts)))
    outgoing = rows.split(list(send_counts))
    works = [
        fabric.recv(incoming[p].view(-1), p, _EXCHANGE_TAG)
        for p in peers
        if p != fabric.rank and recv_counts[p]
    ]
    works += [
        fabric.send(outgoing[p].reshape(-1), p, _EXCHANGE_TAG)
        for p in peers
        if p != fabric.rank and send_counts[p]
    ]
    incoming[fabric.rank].copy_(outgoing[fabric.rank])
    for work in works:
        work.wait()
    return out, list(recv_counts)


class _TorchWork:
    """A c10d work, with the peer's name for the error."""

    def __init__(self, fabric: TorchFabric, work: object, peer: int, keep: Tensor) -> None:
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
        group: a `ProcessGroupGloo` or `ProcessGroupNCCL` over all members of the epoch.
    """

    def __init__(
        self, group: object, rank: int, names: Sequence[str], epoch: int, kind: str
    ) -> None:
        self._group: object | None = group
        self.rank, self.size, self.names = rank, len(names), tuple(names)
        self.epoch, self.kind, self.exact_sizes = epoch, kind, kind == "nccl"
        self.own: dict[int, list[Tensor]] = {}

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

    def close(self) -> None:
        """Drop the group; its sockets close with the last reference."""
        group, self._group = self._group, None
        if group is not None and self.kind == "nccl":
            group.abort()

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


class Rendezvous:
    """The store where ranks of an epoch find each other; lives with whoever makes epochs."""

    def __init__(self, host: str) -> None:
        # The store's own listener would take every interface; it accepts one that is bound already.
        listener = socket.create_server((host, 0), backlog=1024)
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.address = (host, port)


def connect(
    epoch: int,
    rank: int,
    names: Sequence[str],
    *,
    address: tuple[str, int],
    backend: str,
    host: str,
    deadline_s: float,
    rendezvous_s: float = 10.0,
) -> TorchFabric:
    """Meet the other members of an epoch; blocks until all are there.

    Args:
        address: of the `Rendezvous`.
        backend: `gloo` or `nccl`.
        host: own address on the data network.
        deadline_s: longest wait of any later operation.
        rendezvous_s: longest wait for the others here.

    Raises:
        EpochLost: somebody did not come.
        ConfigError: an unknown backend.
    """
    if backend not in ("gloo", "nccl"):
        raise ConfigError(f"fabric {backend!r} is unknown; use gloo or nccl")
    try:
        store = TCPStore(
            address[0], address[1], None, False, timeout=datetime.timedelta(seconds=rendezvous_s)
        )
        keyed = PrefixStore(f"epoch/{epoch}", store)
        if backend == "gloo":
            group: object = _gloo(keyed, rank, len(names), host, deadline_s)
        else:
            group = _nccl(keyed, rank, len(names), deadline_s)
    except RuntimeError as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EpochLost(epoch, [], f"rendezvous at {address}: {detail[:160]}") from None
    return TorchFabric(group, rank, names, epoch, backend)


def _gloo(store: PrefixStore, rank: int, size: int, host: str, deadline_s: float) -> object:
    options = ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=deadline_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 2
    return ProcessGroupGloo(store, rank, size, options)


def _nccl(store: PrefixStore, rank: int, size: int, deadline_s: float) -> object:
    # Absent from CPU builds of torch, so it can only be looked up when asked for.
    group_class = getattr(torch.distributed, "ProcessGroupNCCL", None)
    if group_class is None or not torch.cuda.is_available():
        raise ConfigError(
            "cluster.fabric nccl needs a CUDA build of torch and a visible GPU; "
            "use gloo on CPU members"
        )
    options = group_class.Options()
    options._timeout = datetime.timedelta(seconds=deadline_s)
    return group_class(store, rank, size, options)
