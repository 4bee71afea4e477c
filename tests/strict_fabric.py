"""Threads' fabric with the manners of NCCL: calls of a lane run one after the other, each until every
message of it has been taken by a call of the peer's. What would block there blocks here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from whalepod.cluster.fabric import LANES, Work
from whalepod.cluster.local_fabric import LocalFabric
from whalepod.errors import EpochLost

_ACKNOWLEDGED = 500


class _Waiting:
    def __init__(self, done: Future[None]) -> None:
        self._done = done

    def wait(self) -> None:
        self._done.result()


class StrictFabric:
    """Single messages, as on NCCL, are refused between ranks that also use them the other way."""

    kind, together = "strict", True

    def __init__(self, inner: LocalFabric) -> None:
        self.control = inner
        self.rank, self.size = inner.rank, inner.size
        self.names, self.epoch = inner.names, inner.epoch
        self._lanes = [ThreadPoolExecutor(1, f"lane{n}") for n in range(LANES)]
        self._ways: dict[int, set[str]] = {}
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def all_to_all(
        self, lane: int, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        assert (out.numel(), data.numel()) == (sum(come), sum(go))
        assert out.is_contiguous()
        self.calls.append(lane)
        incoming, outgoing = out.split(list(come)), data.clone().split(list(go))

        @torch.inference_mode()
        def run() -> None:
            for p, part in enumerate(outgoing):
                if go[p] and p != self.rank:
                    self.control.send(part, p, 90 + lane)
            for p, part in enumerate(incoming):
                if come[p] and p == self.rank:
                    part.copy_(outgoing[p])
                elif come[p]:
                    got = self.control.take(p, 90 + lane)
                    assert got.numel() == part.numel(), "NCCL takes no message of another size"
                    part.copy_(got)
                    self.control.send(torch.zeros(1, dtype=torch.uint8), p, _ACKNOWLEDGED + lane)
            for p in range(self.size):
                if go[p] and p != self.rank:
                    self.control.take(p, _ACKNOWLEDGED + lane)

        return self._start(lane, run)

    def _start(self, lane: int, run: Callable[[], None]) -> Work:
        try:
            return _Waiting(self._lanes[lane].submit(run))
        except RuntimeError:
            raise EpochLost(self.epoch, [], "its fabric is closed") from None

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        self._one_way(dst, "send")
        return self.control.send(data, dst, tag)

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        self._one_way(src, "recv")
        return self.control.recv(buffer, src, tag)

    def _one_way(self, peer: int, way: str) -> None:
        with self._lock:
            ways = self._ways.setdefault(peer, set())
            ways.add(way)
            assert len(ways) == 1, f"single messages go both ways between {self.rank} and {peer}"

    def check(self) -> None:
        self.control.check()

    def watch(self, working: bool) -> None: ...

    def close(self) -> None:
        self.control.close()
        for lane in self._lanes:
            lane.shutdown(wait=False)
