from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from whalepod.cluster.doorbell import Doorbell, Ringer


@pytest.fixture
def rings() -> queue.SimpleQueue[str]:
    return queue.SimpleQueue()


@pytest.fixture
def bell(rings: queue.SimpleQueue[str]) -> Iterator[Doorbell]:
    bell = Doorbell("127.0.0.1", lambda: rings.put(threading.current_thread().name))
    yield bell
    bell.close()


def test_every_ring_wakes(bell: Doorbell, rings: queue.SimpleQueue[str]) -> None:
    ringer = Ringer("127.0.0.1", bell.port)
    for _ in range(3):
        ringer()
        assert rings.get(timeout=5) == "doorbell"
    assert rings.empty()


def test_several_members_ring_one_bell(bell: Doorbell, rings: queue.SimpleQueue[str]) -> None:
    for _ in range(4):
        Ringer("127.0.0.1", bell.port)()
    for _ in range(4):
        rings.get(timeout=5)


def test_it_listens_on_its_host_only() -> None:
    bell = Doorbell("127.0.0.1", lambda: None)
    # The same port is free on another address of this machine: nothing holds the wildcard.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.2", bell.port))
    bell.close()


def test_a_ring_at_a_closed_door_is_lost_in_silence() -> None:
    bell = Doorbell("127.0.0.1", lambda: None)
    ringer = Ringer("127.0.0.1", bell.port)
    bell.close()
    for _ in range(3):
        ringer()


def test_close_ends_the_listener_and_may_be_repeated() -> None:
    before = set(threading.enumerate())
    bell = Doorbell("127.0.0.1", lambda: None)
    (listener,) = set(threading.enumerate()) - before
    bell.close()
    bell.close()
    listener.join(5)
    assert not listener.is_alive()


def test_a_ring_ends_a_sleep_early() -> None:
    woken = threading.Event()
    bell = Doorbell("127.0.0.1", woken.set)
    threading.Timer(0.05, Ringer("127.0.0.1", bell.port)).start()
    started = time.monotonic()
    assert woken.wait(5)
    assert time.monotonic() - started < 2
    bell.close()
