"""The fabric over gloo with real processes, and between threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.cluster.fabric import exchange
from whalepod.cluster.local_fabric import LocalFabric, local_fabrics
from whalepod.cluster.rendezvous import Rendezvous, connect
from whalepod.errors import ConfigError, EpochLost

SCRIPT = """
import os, sys, time
import torch
from whalepod.cluster.fabric import exchange
from whalepod.cluster.rendezvous import connect
from whalepod.errors import EpochLost
rank, size, port, epoch, deadline = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 1, float(sys.argv[4])
names = [f"m{i}" for i in range(size)]
def join(epoch, rank=rank, names=names):
    return connect(epoch, rank, names, address=("127.0.0.1", port), backend="gloo",
                   host="127.0.0.1", deadline_s=deadline)
def byte(values):
    return torch.tensor(values, dtype=torch.uint8)
"""


def spawn(body: str, size: int, port: int, deadline_s: float = 20.0) -> list[subprocess.Popen[str]]:
    source = str(Path(__file__).parent.parent / "src")
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + body, str(r), str(size), str(port), str(deadline_s)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        for r in range(size)
    ]


def outputs(processes: Sequence[subprocess.Popen[str]], limit_s: float = 60.0) -> list[str]:
    try:
        return [p.communicate(timeout=limit_s)[0].strip() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def on_threads(size: int, work: object, deadline_s: float = 10.0) -> list[object]:
    fabrics = local_fabrics([f"m{i}" for i in range(size)], deadline_s=deadline_s)
    results: list[object] = [None] * size

    def run(fabric: LocalFabric) -> None:
        try:
            results[fabric.rank] = work(fabric)  # type: ignore[operator]
        except EpochLost as error:
            results[fabric.rank] = error

    threads = [threading.Thread(target=run, args=(f,)) for f in fabrics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=n, max_size=n
        )
    ),
    st.booleans(),
)
def test_exchange_equals_a_plain_all_to_all(counts: list[list[int]], known: bool) -> None:
    size = len(counts)

    def work(fabric: LocalFabric) -> list[list[int]]:
        sent = counts[fabric.rank]
        rows = [[fabric.rank, to, i] for to in range(size) for i in range(sent[to])]
        data = torch.tensor(rows, dtype=torch.uint8).view(-1, 3)
        due = [counts[p][fabric.rank] for p in range(size)] if known else None
        got, came = exchange(fabric, data, sent, due)
        assert came == [counts[p][fabric.rank] for p in range(size)]
        return got.tolist()

    for rank, got in enumerate(on_threads(size, work)):
        expected = [[p, rank, i] for p in range(size) for i in range(counts[p][rank])]
        assert got == expected


def test_messages_match_by_source_and_tag_in_order() -> None:
    a, b = local_fabrics(["a", "b"])
    for tag, value in ((1, 10), (2, 20), (1, 11)):
        a.send(torch.tensor([value], dtype=torch.uint8), 1, tag)
    room = torch.zeros(4, dtype=torch.uint8)
    got = []
    for tag in (2, 1, 1):
        b.recv(room, 0, tag).wait()
        got.append(int(room[0]))
    assert got == [20, 10, 11]


def test_a_closed_peer_wakes_waiters_and_silence_has_a_deadline() -> None:
    def work(fabric: LocalFabric) -> object:
        if fabric.rank == 0:
            time.sleep(0.1)
            fabric.close()
            return "left"
        fabric.recv(torch.zeros(1, dtype=torch.uint8), 0, 1).wait()
        return "never"

    left, woken = on_threads(2, work)
    assert left == "left"
    assert isinstance(woken, EpochLost)
    assert "m0" in str(woken)
    quiet = local_fabrics(["a", "b"], deadline_s=0.05)[0]
    with pytest.raises(EpochLost, match=r"b stopped answering .*0\.05 s"):
        quiet.recv(torch.zeros(1, dtype=torch.uint8), 1, 1).wait()


def test_the_rendezvous_listens_on_its_host_only() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    port = rendezvous.address[1]
    rows = (
        Path("/proc/net/tcp").read_text().splitlines()
        + Path("/proc/net/tcp6").read_text().splitlines()
    )
    hexed = f":{port:04X}"
    found = [r.split()[1] for r in rows if r.split()[1].endswith(hexed) and r.split()[3] == "0A"]
    assert found == [f"0100007F{hexed}"]


def test_unknown_backends_and_absent_gpus_are_refused() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    address = rendezvous.address
    for backend, fact in (("carrier-pigeon", "use gloo or nccl"), ("nccl", "CUDA")):
        if backend == "nccl" and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=fact):
            connect(1, 0, ["a"], address=address, backend=backend, host="127.0.0.1", deadline_s=1)


def test_a_member_that_does_not_come_is_noticed() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    address = rendezvous.address
    with pytest.raises(EpochLost, match="rendezvous"):
        connect(
            7,
            0,
            ["a", "b"],
            address=address,
            backend="gloo",
            host="127.0.0.1",
            deadline_s=1,
            rendezvous_s=1,
        )


@pytest.mark.slow
def test_gloo_moves_bytes() -> None:
    """Exchange with and without counts, a short message in a large room, a message to oneself."""
    rendezvous = Rendezvous("127.0.0.1")
    body = """
f = join(1)
sent = [(rank + p) % 3 for p in range(size)]
rows = torch.cat([torch.full((n, 5), 10 * rank + p, dtype=torch.uint8) for p, n in enumerate(sent)])
got, counts = exchange(f, rows, sent, None)
assert counts == [(rank + p) % 3 for p in range(size)], counts
assert got[:, 0].tolist() == [10 * p + rank for p in range(size) for _ in range((rank + p) % 3)]
again, _ = exchange(f, rows, sent, counts)
assert torch.equal(again, got)
room = torch.full((100,), 7, dtype=torch.uint8)
s = f.send(byte([1, 2, 3]), (rank + 1) % size, 4); f.recv(room, (rank - 1) % size, 4).wait(); s.wait()
assert room[:4].tolist() == [1, 2, 3, 7]
f.send(byte([9]), rank, 5); f.recv(room, rank, 5).wait(); assert int(room[0]) == 9
print("ok"); sys.stdout.flush(); os._exit(0)
"""
    assert outputs(spawn(body, 3, rendezvous.address[1])) == ["ok"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_member_frees_all_others(how: signal.Signals) -> None:
    """m0 waits for the victim, m1 for m0, m3 for m1: the loss must reach them one by one."""
    rendezvous = Rendezvous("127.0.0.1")
    body = """
f = join(1)
print("in", flush=True)
src = {0: 2, 1: 0, 2: 3, 3: 1}[rank]
try:
    f.recv(byte([0] * 8), src, 1).wait()
except EpochLost as error:
    f.close(); del f
    print("lost", error.gone[0], flush=True)
os._exit(0)
"""
    deadline_s = 20.0 if how is signal.SIGKILL else 2.0
    processes = spawn(body, 4, rendezvous.address[1], deadline_s)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "in"
    processes[2].send_signal(how)
    started = time.monotonic()
    said = outputs([processes[r] for r in (0, 1, 3)], 15)
    assert said[0] == "lost m2"
    assert all(s.startswith("lost") for s in said)
    # Far below the 20 s a wait on a living peer would take without the cascade.
    assert time.monotonic() - started < 12
    processes[2].send_signal(signal.SIGCONT)
    outputs(processes[2:3])


@pytest.mark.slow
def test_ten_epochs_in_the_same_processes_leak_nothing() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    body = """
counts = []
for epoch in range(1, 11):
    members = [0, 1, 2] if epoch % 2 else [0, 1]
    if rank in members:
        f = join(epoch, members.index(rank), [f"m{i}" for i in members])
        exchange(f, torch.zeros(len(members), 4, dtype=torch.uint8), [1] * len(members), None)
        f.close(); del f
    time.sleep(0.05)
    if rank == 0: counts.append(len(os.listdir("/proc/self/fd")))
assert rank or max(counts[2:]) <= counts[1] + 2, counts
print("ok"); sys.stdout.flush(); os._exit(0)
"""
    assert outputs(spawn(body, 3, rendezvous.address[1])) == ["ok"] * 3
