"""The fabric between GPUs: NCCL for rows, gloo beside it for words of the host and signs of life.

A kernel of NCCL that waits for a peer waits for ever, and tells nobody when the peer dies. So every
member listens to the next one's pulse, a receive over gloo that is never answered: it fails when
that process ends, and is answered when that member leaves. Either way the communicators
are aborted, which ends their kernels and wakes the host; what those left behind is not used, because
`check` raises from then on.

Each lane has a communicator of its own, so that rows on their way home never wait behind rows that go
out. What the host waits for beyond the deadline within a step ends the same way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from whalepod.cluster.exchange import Work
from whalepod.cluster.fabric import Fabric
from whalepod.errors import ConfigError, EpochLost

log = logging.getLogger(__name__)


class _Ordered:
    """An operation of NCCL: waiting orders the device's stream behind it and does not keep the host."""

    def __init__(self, fabric: NcclFabric, work: object, keep: tuple[Tensor, ...]) -> None:
        self._fabric, self._work, self._keep = fabric, work, keep

    def wait(self) -> None:
        """Order what follows. Raises EpochLost when this end is closed."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._fabric.lost(error) from None
        self._fabric.check()


class NcclFabric:
    """One GPU's end.

    Args:
        lanes: a process group of NCCL for each lane, and one more for single messages.
        control: a fabric over gloo with the same ranks, for tensors on the host.
        pulse: a process group of gloo with the same ranks whose waits do not end by themselves.
        deadline_s: longest that a step may take.
    """

    kind, together = "nccl", True

    def __init__(
        self, lanes: Sequence[object], control: Fabric, pulse: object, deadline_s: float
    ) -> None:
        self._lanes: list[object] = list(lanes)
        self.control = control
        self._pulse: object | None = pulse
        self.rank, self.size = control.rank, control.size
        self.names, self.epoch = control.names, control.epoch
        self._closed, self._lock = "", threading.Lock()
        self._deadline_s, self._ended = deadline_s, threading.Event()
        self._began: float | None = None  # of the step under way
        if self.size > 1:
            threading.Thread(target=self._listen, name="pulse", daemon=True).start()
        threading.Thread(target=self._guard, name="deadline", daemon=True).start()

    def all_to_all(
        self, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        """See `Fabric.all_to_all`: one call of NCCL, which leaves empty edges out."""
        self.check()
        try:
            work = self._lanes[lane].alltoall_base(out, data, list(come), list(go))
        except RuntimeError as error:
            raise self.lost(error) from None
        return _Ordered(self, work, (out, data))

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        """See `Fabric.send`. Between two ranks all messages go one way, or they would block."""
        return self._single("send", data, dst, tag)

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        """See `Fabric.recv`; the size must be the message's."""
        return self._single("recv", buffer, src, tag)

    def _single(self, operation: str, data: Tensor, peer: int, tag: int) -> Work:
        self.check()
        try:
            work = getattr(self._lanes[-1], operation)([data], peer, tag)
        except RuntimeError as error:
            raise self.lost(error) from None
        return _Ordered(self, work, (data,))

    def check(self) -> None:
        """See `Fabric.check`."""
        if self._closed:
            raise EpochLost(self.epoch, [], self._closed)

    def watch(self, working: bool) -> None:
        """See `Fabric.watch`."""
        self._began = time.monotonic() if working else None

    def lost(self, error: Exception) -> EpochLost:
        """Close, and say why."""
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._abort(first[:160])
        return EpochLost(self.epoch, [], self._closed)

    def close(self) -> None:
        """See `Fabric.close`."""
        self._abort("its fabric is closed")
        self.control.close()

    def _abort(self, why: str) -> None:
        with self._lock:
            if self._closed:
                return
            # Before anything stops a kernel: whoever reads what it left behind finds this.
            self._closed = why
        self._ended.set()
        # The last lanes first: nothing computed from rows that never came may go on. An abort
        # returns when the graphs that hold its kernels are gone, so each has a thread of its own.
        for act in (*(lane.abort for lane in reversed(self._lanes)), self._tell):
            threading.Thread(target=act, name="abort", daemon=True).start()

    def _tell(self) -> None:
        """Answer who listens to this member; a group that has lost a peer can only be dropped."""
        pulse, self._pulse = self._pulse, None
        with contextlib.suppress(RuntimeError):
            if pulse is not None and self.size > 1:
                word = torch.zeros(1, dtype=torch.uint8)
                pulse.send([word], (self.rank - 1) % self.size, 0).wait()

    def _listen(self) -> None:
        peer, word = (self.rank + 1) % self.size, torch.zeros(1, dtype=torch.uint8)
        try:
            pulse = self._pulse
            if pulse is not None:
                pulse.recv([word], peer, 0).wait()
            why = f"{self.names[peer]} has left it"
        except RuntimeError as error:
            why = f"{self.names[peer]} is gone: {str(error).splitlines()[0][:120]}"
        del pulse
        if not self._closed:
            log.info("epoch %d: %s", self.epoch, why)
        self._abort(why)

    def _guard(self) -> None:
        while not self._ended.wait(self._deadline_s / 8):
            began = self._began
            if began is not None and time.monotonic() - began > self._deadline_s:
                self._abort(f"a step took longer than {self._deadline_s:g} s")


def open_lanes(stores: Sequence[object], rank: int, size: int) -> list[object]:
    """Make a communicator for every store; let every pair of ranks meet in all but the last.

    Args:
        stores: of `torch.distributed`, each for this epoch and one communicator alone.

    Raises:
        ConfigError: there is no NCCL or no GPU here.
    """
    # Absent from CPU builds of torch, so it can only be looked up when asked for.
    group_class = getattr(torch.distributed, "ProcessGroupNCCL", None)
    if group_class is None or not torch.cuda.is_available():
        raise ConfigError(
            "cluster.fabric nccl needs a CUDA build of torch and a visible GPU; "
            "use gloo on CPU members"
        )
    # Otherwise a thread of torch's ends the whole process when a communicator is aborted.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Nothing here is reduced on the way; setting NVLink's multicast up would cost memory and time.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    made = [group_class(store, rank, size, group_class.Options()) for store in stores]
    # At once: one takes a good part of a second, and streams stand still meanwhile. No kernel of this
    # member waits for others yet, which what a communicator allocates could in turn wait for.
    here = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor(len(made)) as pool:
        list(pool.map(lambda group: group.eager_connect_single_device(here), made[:-1]))
    ones = [1] * size
    data = torch.zeros(size, dtype=torch.uint8, device="cuda")
    for group in made[:-1]:
        group.alltoall_base(torch.empty_like(data), data, ones, ones).wait()
    torch.cuda.synchronize()
    return made
