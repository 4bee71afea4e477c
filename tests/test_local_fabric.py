from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalepod.cluster.fabric import exchange
from whalepod.cluster.local_fabric import LocalFabric, local_fabrics
from whalepod.errors import EpochLost

T = TypeVar("T")


def message(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def receive(fabric: LocalFabric, src: int, tag: int, size: int = 1) -> list[int]:
    buffer = torch.zeros(size, dtype=torch.uint8)
    fabric.recv(buffer, src, tag).wait()
    return list(buffer.tolist())


def on_threads(fabrics: list[LocalFabric], work: Callable[[LocalFabric], T]) -> list[T]:
    with ThreadPoolExecutor(len(fabrics)) as pool:
        return [f.result(30) for f in [pool.submit(work, fabric) for fabric in fabrics]]


def test_fabrics_know_their_place() -> None:
    a, b = local_fabrics(["a", "b"], epoch=7)
    assert (a.rank, b.rank, a.size, a.names, b.epoch) == (0, 1, 2, ("a", "b"), 7)
    assert (a.kind, a.together) == ("local", False)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2), st.integers(0, 255)),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_messages_are_fifo_per_source_destination_and_tag(
    sent: list[tuple[int, int, int, int]], random: object
) -> None:
    fabrics = local_fabrics(["a", "b", "c"])
    expected: dict[tuple[int, int, int], list[int]] = {}
    for src, dst, tag, value in sent:
        fabrics[src].send(message(value), dst, tag).wait()
        expected.setdefault((src, dst, tag), []).append(value)
    edges = [(src, dst, tag) for src, dst, tag, _ in sent]
    random.shuffle(edges)  # type: ignore[attr-defined]
    for src, dst, tag in edges:
        assert receive(fabrics[dst], src, tag) == [expected[src, dst, tag].pop(0)]


def test_a_receive_may_come_before_its_message() -> None:
    a, b = local_fabrics(["a", "b"])
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(receive, b, 0, 1)
        time.sleep(0.02)
        a.send(message(9), 1, 1)
        assert got.result(5) == [9]


def test_the_sender_may_reuse_its_buffer() -> None:
    a, b = local_fabrics(["a", "b"])
    data = message(1)
    a.send(data, 1, 1)
    data[0] = 2
    assert receive(b, 0, 1) == [1]


def test_a_short_message_leaves_the_rest_of_the_buffer() -> None:
    a, b = local_fabrics(["a", "b"])
    a.send(message(1, 2), 1, 1)
    buffer = message(7, 7, 7, 7)
    b.recv(buffer, 0, 1).wait()
    assert buffer.tolist() == [1, 2, 7, 7]


def test_a_message_that_does_not_fit_ends_the_epoch() -> None:
    a, b = local_fabrics(["a", "b"], epoch=4)
    a.send(message(1, 2), 1, 1)
    with pytest.raises(EpochLost, match="2 bytes came where 1 fit") as lost:
        receive(b, 0, 1, size=1)
    assert (lost.value.epoch, lost.value.gone) == (4, ("a",))


def test_a_rank_may_send_to_itself() -> None:
    (a,) = local_fabrics(["a"])
    a.send(message(5), 0, 1)
    assert receive(a, 0, 1) == [5]


def test_silence_past_the_deadline_names_the_silent() -> None:
    a, _ = local_fabrics(["a", "b"], epoch=2, deadline_s=0.05)
    started = time.monotonic()
    with pytest.raises(EpochLost, match=r"no message within 0\.05 s") as lost:
        receive(a, 1, 1)
    assert 0.04 < time.monotonic() - started < 2
    assert lost.value.gone == ("b",)


@pytest.mark.parametrize("leaver", ["b", "a"])
def test_close_wakes_who_waits_for_the_leaver(leaver: str) -> None:
    fabrics = local_fabrics(["a", "b"], deadline_s=30)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receive, fabrics[0], 1, 1)
        time.sleep(0.02)
        started = time.monotonic()
        fabrics["ab".index(leaver)].close()
        with pytest.raises(EpochLost, match="its fabric is closed") as lost:
            waiting.result(5)
    assert time.monotonic() - started < 2
    assert lost.value.gone == (leaver,)


def test_close_leaves_waits_on_others_alone() -> None:
    a, b, c = local_fabrics(["a", "b", "c"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receive, a, 1, 1)
        time.sleep(0.02)
        c.close()
        time.sleep(0.02)
        assert not waiting.done()
        b.send(message(3), 0, 1)
        assert waiting.result(5) == [3]


def test_what_was_sent_before_leaving_still_arrives() -> None:
    a, b = local_fabrics(["a", "b"])
    b.send(message(8), 0, 1)
    b.close()
    assert receive(a, 1, 1) == [8]
    with pytest.raises(EpochLost):
        receive(a, 1, 1)


def test_nothing_is_sent_to_or_from_a_closed_end() -> None:
    a, b = local_fabrics(["a", "b"])
    b.close()
    b.close()
    for sender, dst in ((a, 1), (b, 0)):
        with pytest.raises(EpochLost) as lost:
            sender.send(message(1), dst, 1)
        assert lost.value.gone == ("b",)


counts = st.integers(1, 4).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=n, max_size=n), min_size=n, max_size=n
    )
)


@given(counts, st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_exchange_is_an_all_to_all(
    send: list[list[int]], width: int, known: bool, seed: int
) -> None:
    size = len(send)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, 256, (sum(to), width), dtype=torch.uint8, generator=generator)
        for to in send
    ]

    def work(fabric: LocalFabric) -> tuple[Tensor, list[int]]:
        receives = [send[src][fabric.rank] for src in range(size)] if known else None
        return exchange(fabric, rows[fabric.rank], send[fabric.rank], receives)

    found = on_threads(local_fabrics([str(r) for r in range(size)]), work)
    plain = [r.tolist() for r in rows]
    for rank, (got, got_counts) in enumerate(found):
        expected = []
        for src in range(size):
            start = sum(send[src][:rank])
            expected += plain[src][start : start + send[src][rank]]
        assert got_counts == [send[src][rank] for src in range(size)]
        assert got.shape == (len(expected), width)
        assert got.tolist() == expected


def test_exchange_sends_nothing_on_empty_edges() -> None:
    a, b = local_fabrics(["a", "b"], deadline_s=0.1)
    # Rank 1 takes no part at all: with all counts known and zero, nobody waits for it.
    out, got = exchange(a, torch.ones(2, 3, dtype=torch.uint8), [2, 0], [2, 0])
    assert (out.tolist(), got) == ([[1, 1, 1], [1, 1, 1]], [2, 0])
    with pytest.raises(EpochLost):
        receive(b, 0, 90)


def test_exchange_twice_in_a_row_keeps_the_rounds_apart() -> None:
    def work(fabric: LocalFabric) -> list[list[int]]:
        found = []
        for round_ in range(5):
            rows = torch.full((3, 1), 10 * round_ + fabric.rank, dtype=torch.uint8)
            got, _ = exchange(fabric, rows, [1, 1, 1], [1, 1, 1])
            found.append(got.flatten().tolist())
        return found

    for found in on_threads(local_fabrics(["a", "b", "c"]), work):
        assert found == [[10 * r, 10 * r + 1, 10 * r + 2] for r in range(5)]


def test_a_loss_reaches_everybody_when_each_closes_its_end() -> None:
    fabrics = local_fabrics(["a", "b", "c", "d"], deadline_s=30)
    ready = threading.Barrier(4)

    def work(fabric: LocalFabric) -> str:
        ready.wait(5)
        if fabric.rank == 3:
            time.sleep(0.05)
            fabric.close()
            return "left"
        try:
            receive(fabric, fabric.rank + 1, 1)  # 0 waits on 1, 1 on 2, 2 on the one that leaves
        except EpochLost as lost:
            fabric.close()
            return lost.gone[0]
        return "served"

    started = time.monotonic()
    assert on_threads(fabrics, work) == ["b", "c", "d", "left"]
    assert time.monotonic() - started < 5
