"""Messages of steps of fixed sizes: how large they are, and where their parts lie.

Legend: C rows of a home, K experts per token, D width, M rows at a shard.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

SEAL_BYTES = 16
# Messages fill up to this, so that rows start where wide loads can.
_UNIT = 64
_SLACK = 8


@dataclass(frozen=True, slots=True)
class FixedForm:
    """Bytes of messages.

    Args:
        width: D, in `dtype`. k: K. shards: among how many a token's experts are spread.
    """

    width: int
    dtype: torch.dtype
    k: int
    shards: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of values."""
        return self.width * self.dtype.itemsize

    def room(self, rows: int, wide: bool) -> int:
        """Outputs for so many rows that fit into a shard's message: all, or twice its even share."""
        pairs = rows * self.k
        return pairs if wide else min(pairs, -(-2 * pairs // self.shards) + _SLACK)

    def to_router(self, rows: int) -> int:
        """Rows, token ids, seal."""
        return _whole(rows * (self.row_bytes + 4))

    def to_shard(self, rows: int) -> int:
        """Rows, expert ids (-1: not at this shard), weights, seal."""
        return _whole(rows * (self.row_bytes + 8 * self.k))

    def to_home(self, rows: int, wide: bool) -> int:
        """Outputs, the place of every choice's among them (-1: not at this shard), seal."""
        return _whole(self.room(rows, wide) * self.row_bytes + 4 * rows * self.k)

    def split(self, message: Tensor, rows: int, *ints: tuple[int, int]) -> list[Tensor]:
        """Views of a message's parts, `[..., bytes]`.

        Args:
            rows: how many rows of values. ints: shapes of the int32 numbers after them.

        Returns:
            rows `[..., rows, D]`, each of `ints` `[..., a, b]` int32, and the seal `[..., 4]` int32.
        """
        size = rows * self.row_bytes
        parts = [message[..., :size].view(self.dtype).unflatten(-1, (rows, self.width))]
        for shape in ints:
            end = size + 4 * shape[0] * shape[1]
            parts.append(message[..., size:end].view(torch.int32).unflatten(-1, shape))
            size = end
        return [*parts, message[..., size : size + SEAL_BYTES].view(torch.int32)]


def where(form: FixedForm, arrivals: Seq[tuple[int, int]], wide: bool) -> list[list[int]]:
    """The table of `kernels/hand_back.py`, a line for each row at a shard.

    Args:
        arrivals: (home's rank, rows) in the order in which they come; answers go by rank.
    """
    start_of, start = dict[int, int](), 0
    for home, count in sorted(arrivals):
        start_of[home], start = start, start + form.to_home(count, wide)
    lines: list[list[int]] = []
    came = 0
    for home, count in arrivals:
        first, out, room = len(lines), start_of[home], form.room(count, wide)
        ids, places = came + count * form.row_bytes, out + room * form.row_bytes
        bits = ids + 4 * count * form.k
        for i in range(count):
            step = 4 * i * form.k
            seals = (bits + 4 * count * form.k, places + 4 * count * form.k) if i == 0 else (-1, -1)
            x = came + i * form.row_bytes
            lines.append(
                [x, ids + step, bits + step, seals[0], first, out, room, places + step, seals[1]]
            )
        came += form.to_shard(count)
    return lines


def _whole(size: int) -> int:
    return -(-(size + SEAL_BYTES) // _UNIT) * _UNIT
