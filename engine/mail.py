"""Messages of the legs of one step: each for itself, or, where the fabric wants that, a leg at a time.

A leg at a time, a message is asked for and handed in first and goes when its leg is posted: sizes in one
exchange, bytes in the next. So the order in which a member asks and sends within a leg does not matter,
and no rank waits for one that waits for it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric, Work
from whalepod.engine.legs import LANE_OF, Incoming, Outgoing, Place

# Sizes and bytes of a leg for each of three micro-batches, twice.
_KEPT = 12


class Letter(Protocol):
    """A message that has been asked for."""

    def take(self) -> Tensor:
        """Wait for it and return its bytes (perhaps with unused room behind). Raises EpochLost."""
        ...


class _Leg:
    """What one member sends and expects in a leg of one pass."""

    def __init__(self) -> None:
        self.sends: dict[int, Tensor] = {}
        self.asked: dict[int, _Parcel] = {}


class _Parcel:
    """A message that comes with its leg."""

    def __init__(self, mail: Mail, tag: int, place: Place) -> None:
        self._mail, self._tag, self._place = mail, tag, place
        self.message: Tensor | None = None

    def take(self) -> Tensor:
        """See `Letter`."""
        if self.message is None:
            self._mail.post(self._tag, self._place)
        assert self.message is not None
        return self.message


class Mail:
    """One member's post for one step."""

    def __init__(self, fabric: Fabric, device: torch.device) -> None:
        self._fabric, self._device = fabric, device
        self._out = Outgoing()
        self._legs: dict[tuple[int, Place], _Leg] = {}
        self._leaving: list[Work] = []

    def send(self, tag: int, place: Place, message: Tensor, dst: int, room: int) -> None:
        """Send a message whose receiver expects at most `room` bytes."""
        if self._fabric.together:
            self._leg(tag, place).sends[dst] = message
        else:
            self._out.send(self._fabric, message, dst, tag, room)

    def ask(self, tag: int, place: Place, src: int, room: int) -> Letter:
        """Ask for the message of a rank."""
        if not self._fabric.together:
            return Incoming(self._fabric, src, tag, room, self._device)
        parcel = self._leg(tag, place).asked[src] = _Parcel(self, tag, place)
        return parcel

    def post(self, tag: int, place: Place) -> None:
        """Let a leg go, once everything this member sends and expects in it is known. Raises EpochLost."""
        leg = self._legs.pop((tag, place), None)
        if leg is None:
            return
        ranks, lane = range(self._fabric.size), LANE_OF[tag]
        go = [leg.sends[r].numel() if r in leg.sends else 0 for r in ranks]
        told = torch.tensor([n for n in go if n], dtype=torch.int64).view(torch.uint8)
        told = told.to(self._device)
        heard = torch.empty(8 * len(leg.asked), dtype=torch.uint8, device=self._device)
        come = [8 * (r in leg.asked) for r in ranks]
        words = self._fabric.all_to_all(lane, heard, told, come, [8 * (n > 0) for n in go])
        if leg.asked:
            words.wait()
            sizes = iter(heard.cpu().view(torch.int64).tolist())
            self._fabric.check()
        come = [next(sizes) if r in leg.asked else 0 for r in ranks]
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        data = torch.cat([leg.sends[r] for r in ranks if r in leg.sends] or [nothing])
        out = torch.empty(sum(come), dtype=torch.uint8, device=self._device)
        work = self._fabric.all_to_all(lane, out, data, come, go)
        if not leg.asked:
            self._leaving += [words, work]
            # So old a leg has arrived, or its homes could not have gone on; its memory is wanted.
            while len(self._leaving) > _KEPT:
                self._leaving.pop(0).wait()
            return
        work.wait()
        for rank, message in enumerate(out.split(come)):
            if rank in leg.asked:
                leg.asked[rank].message = message

    def check(self) -> None:
        """Raise EpochLost when what was taken may not be what was sent; after it is on the host."""
        self._fabric.check()

    def settle(self) -> None:
        """Wait until everything sent has left; the end of a step."""
        self._out.settle()
        for work in self._leaving:
            work.wait()
        self._leaving.clear()

    def _leg(self, tag: int, place: Place) -> _Leg:
        return self._legs.setdefault((tag, place), _Leg())
