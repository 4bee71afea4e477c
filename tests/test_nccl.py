"""What surrounds NCCL: signs of life, deadlines and aborts, with groups that stand in for GPUs'."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from whalepod.cluster import rendezvous
from whalepod.cluster.fabric import LANES, TorchFabric
from whalepod.cluster.nccl import NcclFabric, open_lanes
from whalepod.cluster.rendezvous import Rendezvous, connect
from whalepod.errors import ConfigError, EpochLost

NAMES = ["a", "b", "c"]


class Work:
    def __init__(self, broken: threading.Event) -> None:
        self._broken = broken

    def wait(self) -> None:
        if self._broken.is_set():
            raise RuntimeError("NCCL communicator was aborted")


class Lane:
    """A communicator that notes what it is told."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.calls: list[tuple[list[int], list[int]]] = []

    def alltoall_base(
        self, out: Tensor, data: Tensor, come: Sequence[int], go: Sequence[int]
    ) -> Work:
        self.calls.append((list(come), list(go)))
        return Work(self.aborted)

    def send(self, data: Sequence[Tensor], peer: int, tag: int) -> Work:
        return Work(self.aborted)

    def abort(self) -> None:
        self.aborted.set()


def fabric(address: tuple[str, int], rank: int, names: list[str], deadline_s: float) -> NcclFabric:
    store = PrefixStore("e", TCPStore(address[0], address[1], None, False))
    group = rendezvous._gloo(store, rank, len(names), "127.0.0.1", 20)
    pulse = rendezvous._gloo(PrefixStore("p", store), rank, len(names), "127.0.0.1", 1e6)
    control = TorchFabric(group, rank, names, 1)
    return NcclFabric([Lane() for _ in range(LANES + 1)], control, pulse, deadline_s)


@contextmanager
def fabrics(deadline_s: float = 30.0) -> Iterator[list[NcclFabric]]:
    meeting, made = Rendezvous("127.0.0.1"), dict[int, NcclFabric]()

    def one(rank: int) -> None:
        made[rank] = fabric(meeting.address, rank, NAMES, deadline_s)

    threads = [threading.Thread(target=one, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = [made[r] for r in range(3)]
    try:
        yield found
    finally:
        for each in found:
            each.close()


def aborted(one: NcclFabric) -> bool:
    return all(lane.aborted.wait(5) for lane in one._lanes)  # type: ignore[attr-defined]


def exchange(one: NcclFabric) -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    one.all_to_all(1, empty, empty, [0, 0, 0], [0, 0, 0]).wait()


def test_a_lane_takes_sizes_by_rank_and_single_messages_have_one_of_their_own() -> None:
    with fabrics() as (a, _, _):
        a.all_to_all(1, torch.zeros(3), torch.zeros(1), [0, 1, 2], [0, 0, 1]).wait()
        a.send(torch.zeros(1), 1, 5).wait()
        assert [lane.calls for lane in a._lanes] == [  # type: ignore[attr-defined]
            *([], [([0, 1, 2], [0, 0, 1])], [], [])
        ]
        assert a.together
        assert not a.control.together


def test_who_leaves_ends_it_for_all() -> None:
    with fabrics() as (a, b, c):
        exchange(a)
        b.close()
        assert all(map(aborted, (a, b, c)))
        with pytest.raises(EpochLost, match="b has left it"):
            a.check()
        with pytest.raises(EpochLost, match="has left it"):
            exchange(c)


def test_what_was_computed_after_an_abort_is_refused() -> None:
    with fabrics() as (a, _, _):
        empty = torch.empty(0, dtype=torch.uint8)
        work = a.all_to_all(1, empty, empty, [0] * 3, [0] * 3)
        a.close()
        assert aborted(a)
        with pytest.raises(EpochLost, match="closed"):
            work.wait()


def test_a_step_that_outlasts_the_deadline_closes_the_fabric() -> None:
    with fabrics(deadline_s=0.4) as (a, _, c):
        for _ in range(3):  # steps that end in time
            a.watch(True)
            time.sleep(0.2)
            a.watch(False)
        a.check()
        a.watch(True)
        assert aborted(a)
        with pytest.raises(EpochLost, match=r"longer than 0\.4 s"):
            a.check()
        assert aborted(c)


KILLED = """
import sys
sys.path[:0] = {paths!r}
from test_nccl import fabric, NAMES
one = fabric(("127.0.0.1", {port}), 2, NAMES, 30)
print("here", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_is_noticed_at_once_by_all() -> None:
    meeting, made = Rendezvous("127.0.0.1"), dict[int, NcclFabric]()
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(paths=paths, port=meeting.address[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def one(rank: int) -> Callable[[], None]:
        return lambda: made.update({rank: fabric(meeting.address, rank, NAMES, 30)})

    threads = [threading.Thread(target=one(r)) for r in (0, 1)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.kill()
        assert all(map(aborted, made.values()))
        with pytest.raises(EpochLost, match="c is gone"):
            made[1].check()
    finally:
        process.kill()
        process.communicate()
        for each in made.values():
            each.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can run")
def test_without_a_gpu_nccl_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA build of torch"):
        open_lanes([], 0, 1)
    meeting = Rendezvous("127.0.0.1")
    with pytest.raises(ConfigError, match="needs a CUDA build of torch"):
        connect(
            *(1, 0, ["a"]), address=meeting.address, backend="nccl", host="127.0.0.1", deadline_s=5
        )


def test_a_communicator_that_never_comes_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = threading.Event()
    monkeypatch.setattr(rendezvous, "_NCCL_S", 0.2)
    monkeypatch.setattr(rendezvous, "open_lanes", lambda *_: never.wait(30))
    meeting = Rendezvous("127.0.0.1")
    with pytest.raises(EpochLost, match=r"were not there within 0\.2 s"):
        connect(
            *(1, 0, ["a"]), address=meeting.address, backend="nccl", host="127.0.0.1", deadline_s=5
        )
    never.set()
