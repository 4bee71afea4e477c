import pytest
import torch

from whalepod.cluster.local_fabric import local_fabrics
from whalepod.engine import legs
from whalepod.engine.legs import Form, Incoming, Outgoing, Place
from whalepod.errors import EpochLost

PLACE = Place(3, 17, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_message_round_trips_with_room_to_spare(dtype: torch.dtype, rows: int) -> None:
    form = Form(4, 6, dtype)
    ints = torch.randint(-9, 1 << 30, (rows, 4), dtype=torch.int32)
    values = torch.randn(rows, 6).to(dtype)
    message = form.pack(PLACE, ints, values)
    assert message.numel() == form.bytes_of(rows)
    padded = torch.cat([message, torch.full((64,), 255, dtype=torch.uint8)])
    got_ints, got_values = form.unpack(PLACE, padded)
    assert torch.equal(got_ints, ints)
    assert torch.equal(got_values, values)


def test_header_bytes() -> None:
    message = Form(1, 2, torch.float32).pack(PLACE, torch.tensor([[7]]), torch.zeros(1, 2))
    expected = b"".join(n.to_bytes(4, "little") for n in (3, 17, 1, 1, 7))
    assert bytes(message.numpy())[:20] == expected


@pytest.mark.parametrize("other", [Place(2, 17, 1), Place(3, 16, 1), Place(3, 17, 0)])
def test_another_pass_is_refused(other: Place) -> None:
    form = Form(1, 2, torch.float32)
    message = form.pack(other, torch.tensor([[7]]), torch.zeros(1, 2))
    with pytest.raises(EpochLost, match="came for"):
        form.unpack(PLACE, message)


@pytest.mark.parametrize("room", [100, legs.SIZED_BYTES + 1])
def test_small_messages_come_alone_and_large_ones_after_their_size(room: int) -> None:
    a, b = local_fabrics(["a", "b"])
    out, sent = Outgoing(), torch.arange(60, dtype=torch.uint8)
    out.send(a, sent, 1, 5, room)
    incoming = Incoming(b, 0, 5, room, torch.device("cpu"))
    got = incoming.take()
    assert torch.equal(got[:60], sent)
    assert got.numel() == (60 if room > legs.SIZED_BYTES else room)
    out.settle()


def test_where_sizes_must_be_exact_messages_are_filled_up() -> None:
    a, b = local_fabrics(["a", "b"])
    a.exact_sizes = True  # as on NCCL
    Outgoing().send(a, torch.ones(60, dtype=torch.uint8), 1, 5, 100)
    assert b.take(0, 5).numel() == 100
