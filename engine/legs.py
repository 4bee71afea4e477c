"""The three legs of a layer: attention to router, router to expert shards, shards home.

`docs/wire.md` has the layout. One message per edge and leg: 16 bytes of header (epoch, layer,
micro-batch, row count), then `ints` int32 columns per row, then the rows themselves.

Legend: M rows of a message, C int columns, D width, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric, Work
from whalepod.errors import EpochLost

HEADER_BYTES = 16
TAG_HEADER, TAG_ROUTER, TAG_SHARD, TAG_HOME, TAG_STAGE, TAG_TOKENS = range(1, 7)
# Where messages of a leg travel in one call, each leg has a lane.
LANE_OF = {TAG_ROUTER: 0, TAG_SHARD: 1, TAG_HOME: 2}
# A message that may be larger than this is preceded by its size, so that the receiver need not
# set the largest possible room aside; smaller ones come alone, for latency.
SIZED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Which pass of an epoch a message belongs to."""

    epoch: int
    layer: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Form:
    """Shape of one leg's rows: `ints` int32 columns and `width` values of `dtype`."""

    ints: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, columns included."""
        return 4 * self.ints + self.width * self.dtype.itemsize

    def bytes_of(self, rows: int) -> int:
        """Bytes of a message with that many rows."""
        return HEADER_BYTES + rows * self.row_bytes

    def pack(self, place: Place, ints_MC: Tensor, rows_MD: Tensor) -> Tensor:
        """Lay a message out as uint8."""
        count, device = rows_MD.shape[0], rows_MD.device
        head = torch.tensor([place.epoch, place.layer, place.micro_batch, count], dtype=torch.int32)
        return torch.cat(
            [
                head.view(torch.uint8).to(device),
                ints_MC.to(torch.int32).contiguous().view(torch.uint8).flatten(),
                rows_MD.contiguous().view(torch.uint8).flatten(),
            ]
        )

    def unpack(self, place: Place, message: Tensor) -> tuple[Tensor, Tensor]:
        """Return ints `[M, C]` int32 and rows `[M, D]`. Raises EpochLost for another pass's."""
        head = message[:HEADER_BYTES].view(torch.int32).tolist()
        if head[:3] != [place.epoch, place.layer, place.micro_batch]:
            raise EpochLost(place.epoch, [], f"a message of pass {head[:3]} came for {place}")
        split = HEADER_BYTES + 4 * self.ints * head[3]
        ints = message[HEADER_BYTES:split].view(torch.int32).view(head[3], self.ints)
        rows = message[split : split + head[3] * self.width * self.dtype.itemsize]
        return ints, rows.view(self.dtype).view(head[3], self.width)


class Outgoing:
    """Messages under way; keeps their buffers until they have left."""

    def __init__(self) -> None:
        self._works: list[Work] = []

    def send(self, fabric: Fabric, message: Tensor, dst: int, tag: int, room: int) -> None:
        """Send a message whose receiver expects at most `room` bytes."""
        size = message.numel()
        if room > SIZED_BYTES:
            head = torch.tensor([size], dtype=torch.int64).view(torch.uint8).to(message.device)
            self._works.append(fabric.send(head, dst, tag))
        self._works.append(fabric.send(message, dst, tag))

    def settle(self) -> None:
        """Wait until all have left."""
        for work in self._works:
            work.wait()
        self._works.clear()


class Incoming:
    """A message that has been asked for."""

    def __init__(self, fabric: Fabric, src: int, tag: int, room: int, device: torch.device) -> None:
        self._fabric, self._src, self._tag = fabric, src, tag
        self._sized = room > SIZED_BYTES
        size = 8 if self._sized else room
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._work = fabric.recv(self._buffer, src, tag)

    def take(self) -> Tensor:
        """Wait for it and return its bytes (perhaps with unused room behind)."""
        self._work.wait()
        if self._sized:
            size = int(self._buffer.view(torch.int64).item())
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._buffer.device)
            self._fabric.recv(self._buffer, self._src, self._tag).wait()
        return self._buffer


def to_router(width: int, dtype: torch.dtype) -> Form:
    """Leg 1: a token id beside each row."""
    return Form(1, width, dtype)


def to_shard(width: int, dtype: torch.dtype, k: int) -> Form:
    """Leg 2: home rank, row at home, K expert ids (-1: not on this shard), K weights (fp32 bits)."""
    return Form(2 + 2 * k, width, dtype)


def to_home(width: int, dtype: torch.dtype) -> Form:
    """Leg 3: row at home and index of the choice; one row per (token, expert)."""
    return Form(2, width, dtype)
