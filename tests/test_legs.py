from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whalepod.cluster.fabric import Work
from whalepod.cluster.local_fabric import local_fabrics
from whalepod.engine.legs import (
    HEADER_BYTES,
    SIZED_BYTES,
    Form,
    Incoming,
    Outgoing,
    Place,
    to_home,
    to_router,
    to_shard,
)
from whalepod.errors import EpochLost

PLACE = Place(3, 17, 1)
CPU = torch.device("cpu")


def random_message(form: Form, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ints = torch.randint(-(2**31), 2**31 - 1, (rows, form.ints), generator=generator).int()
    # Random bytes, so that NaNs, infinities and denormals travel too.
    size = rows * form.width * form.dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return ints, data.view(form.dtype).view(rows, form.width)


def bits(x: Tensor) -> list[int]:
    return list(x.contiguous().view(torch.uint8).flatten().tolist())


forms = st.builds(
    Form,
    ints=st.integers(1, 14),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@given(forms, st.integers(0, 6), st.integers(0, 9), st.integers(0, 1000))
def test_pack_and_unpack(form: Form, rows: int, spare: int, seed: int) -> None:
    ints, x = random_message(form, rows, seed)
    message = form.pack(PLACE, ints, x)
    assert message.dtype == torch.uint8
    assert message.numel() == form.bytes_of(rows)
    padded = torch.cat([message, torch.full((spare,), 255, dtype=torch.uint8)])
    got_ints, got_x = form.unpack(PLACE, padded)
    assert got_ints.shape == (rows, form.ints)
    assert torch.equal(got_ints, ints)
    assert (got_x.shape, got_x.dtype) == ((rows, form.width), form.dtype)
    assert bits(got_x) == bits(x)


def test_pack_takes_wider_ints_and_strided_rows() -> None:
    form = to_router(4, torch.float32)
    ids, x = torch.arange(3).unsqueeze(1), torch.arange(24.0).view(3, 8)[:, ::2]
    ints, rows = form.unpack(PLACE, form.pack(PLACE, ids, x))
    assert ints.flatten().tolist() == [0, 1, 2]
    assert torch.equal(rows, x)


def test_layout_is_header_then_ints_then_rows() -> None:
    form = Form(1, 2, torch.float32)
    message = form.pack(PLACE, torch.tensor([[7], [8]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert message[:HEADER_BYTES].view(torch.int32).tolist() == [3, 17, 1, 2]
    assert message[16:24].view(torch.int32).tolist() == [7, 8]
    assert message[24:].view(torch.float32).tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("other", [Place(4, 17, 1), Place(3, 16, 1), Place(3, 17, 0)])
def test_a_message_of_another_pass_is_refused(other: Place) -> None:
    form = to_home(4, torch.bfloat16)
    message = form.pack(other, *random_message(form, 2))
    with pytest.raises(EpochLost, match="came for Place") as lost:
        form.unpack(PLACE, message)
    assert lost.value.epoch == 3


def test_legs_have_their_columns() -> None:
    assert to_router(8, torch.bfloat16).row_bytes == 4 + 16
    assert to_shard(8, torch.float32, 6).row_bytes == 4 * (2 + 2 * 6) + 32
    assert to_home(8, torch.bfloat16).row_bytes == 8 + 16


# -- travel -------------------------------------------------------------------------------


@dataclass
class FakeWork:
    waited: int = 0

    def wait(self) -> None:
        self.waited += 1


@dataclass
class FakeFabric:
    """Remembers what is sent; a receive gets the next of `arriving`, whose size must be exact."""

    rank: int = 0
    size: int = 2
    epoch: int = 3
    names: tuple[str, ...] = ("a", "b")
    kind: str = "fake"
    sent: list[tuple[int, int, Tensor]] = field(default_factory=list)
    works: list[FakeWork] = field(default_factory=list)
    arriving: list[Tensor] = field(default_factory=list)

    def send(self, data: Tensor, dst: int, tag: int) -> Work:
        self.sent.append((dst, tag, data))
        self.works.append(FakeWork())
        return self.works[-1]

    def recv(self, buffer: Tensor, src: int, tag: int) -> Work:
        message = self.arriving.pop(0)
        assert buffer.numel() == message.numel()
        buffer.copy_(message)
        return FakeWork()

    def close(self) -> None: ...


def payload(size: int) -> Tensor:
    return (torch.arange(size) % 251).to(torch.uint8)


def test_a_message_goes_as_it_is() -> None:
    fabric, message = FakeFabric(), payload(40)
    Outgoing().send(fabric, message, 1, 5, 100)
    ((dst, tag, data),) = fabric.sent
    assert (dst, tag) == (1, 5)
    assert data is message


def test_a_message_that_may_be_large_is_preceded_by_its_size() -> None:
    fabric = FakeFabric()
    Outgoing().send(fabric, payload(40), 1, 5, SIZED_BYTES + 1)
    head, message = (data for _, _, data in fabric.sent)
    assert head.view(torch.int64).tolist() == [40]
    assert message.equal(payload(40))
    receiver = FakeFabric(arriving=[head, message])
    assert Incoming(receiver, 0, 5, SIZED_BYTES + 1, CPU).take().equal(payload(40))


def test_the_threshold_itself_goes_without_a_size() -> None:
    fabric = FakeFabric()
    Outgoing().send(fabric, payload(40), 1, 5, SIZED_BYTES)
    assert [data.numel() for _, _, data in fabric.sent] == [40]


def test_settle_waits_once_for_each() -> None:
    fabric, out = FakeFabric(), Outgoing()
    for size, room in ((4, 4), (4, 9), (4, SIZED_BYTES + 1)):
        out.send(fabric, payload(size), 1, 5, room)
    out.settle()
    out.settle()
    assert [work.waited for work in fabric.works] == [1, 1, 1, 1]


def test_messages_of_every_size_arrive_in_order() -> None:
    a, b = local_fabrics(["a", "b"])
    sizes = [1, 100, SIZED_BYTES, SIZED_BYTES + 1, 7]
    rooms = [1, SIZED_BYTES + 2, SIZED_BYTES, SIZED_BYTES + 1, 8]
    out = Outgoing()
    for size, room in zip(sizes, rooms, strict=True):
        out.send(a, payload(size), 1, 5, room)
    for size, room in zip(sizes, rooms, strict=True):
        taken = Incoming(b, 0, 5, room, CPU).take()
        assert taken[:size].equal(payload(size))
    out.settle()
