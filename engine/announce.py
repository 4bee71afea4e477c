"""The step header: what every member learns before a step, and the only control message of one.

The lead speaks first; the other attention replicas answer it, so that idle ones stay in step and
a stop reaches everybody at the same boundary. `docs/wire.md` has the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from whalepod.cluster.fabric import Fabric
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import TAG_HEADER, Outgoing
from whalepod.errors import EpochLost

_WORDS = 6


class Announcer:
    """Exchanges headers on one member, and counts steps."""

    def __init__(self, fabric: Fabric, lanes: Lanes) -> None:
        self._rows, self._fabric, self._lanes = fabric, fabric.control, lanes
        self.step = 0
        self._out = Outgoing()
        first = lanes.homes[0]
        self._replica = first.index(fabric.rank) if fabric.rank in first else None

    def exchange(self, mine: Callable[[], Announcement] | None) -> dict[int, Announcement] | None:
        """Learn every replica's rows; None means stop here.

        Args:
            mine: says what this member brings; asked only of stage-0 attention members, of all at once. Who has
                nothing is asked again when the lead has spoken: that can take long.
        """
        self._rows.watch(working=False)
        self.step += 1
        lead_rank, found = self._lanes.lead, dict[int, Announcement]()
        if self._fabric.rank == lead_rank:
            assert mine is not None
            found[0] = mine()
            self._tell(found[0])
        else:
            early = mine() if mine is not None and self._replica else None
            found[0] = self._hear(lead_rank)
        if found[0].stop:
            self._out.settle()
            return None
        if self._replica:
            assert mine is not None
            found[self._replica] = early if early is not None and any(early.rows) else mine()
            self._tell(found[self._replica])
        for replica, rank in enumerate(self._lanes.homes[0]):
            if replica not in found:
                found[replica] = self._hear(rank)
        self._out.settle()
        self._rows.watch(working=True)
        return found

    def _tell(self, said: Announcement) -> None:
        flags = said.stop + 2 * said.even + 4 * said.wide
        words = [self._lanes.epoch, self.step, flags, *said.rows]
        message = torch.tensor(words, dtype=torch.int64).view(torch.uint8)
        for rank in range(self._fabric.size):
            if rank != self._fabric.rank:
                self._out.send(self._fabric, message, rank, TAG_HEADER, message.numel())

    def _hear(self, rank: int) -> Announcement:
        buffer = torch.empty(8 * _WORDS, dtype=torch.uint8)
        self._fabric.recv(buffer, rank, TAG_HEADER).wait()
        epoch, step, flags, a, b, c = buffer.view(torch.int64).tolist()
        if (epoch, step) != (self._lanes.epoch, self.step):
            raise EpochLost(
                self._lanes.epoch,
                [self._fabric.names[rank]],
                f"its header is of epoch {epoch} step {step}, not step {self.step}",
            )
        return Announcement((a, b, c), *(bool(flags & bit) for bit in (1, 2, 4)))
