"""Who is in, and which epoch comes next: the controller's decisions, without Ray.

Members join and then ask for orders in a long poll. A change (join, leave, loss) makes the next
epoch: its members load what it needs beside the epoch that still runs (`prepare`), then all switch
at one step boundary (`enter`). Nothing here is on the data path, and all state can be rebuilt from
what members say when they join.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from whalepod.cluster.epoch import Epoch, Seat
from whalepod.cluster.placement import Placement
from whalepod.cluster.report import Order, Phase, Record, report
from whalepod.cluster.topology import MemberInfo, lacking, seat
from whalepod.config import Config
from whalepod.errors import ConfigError

log = logging.getLogger(__name__)


class Membership:
    """Makes epochs.

    Args:
        config: its digest must be every member's.
        layers, experts: sizes of the model, for placement.
        alive: asks a member's handle whether its process lives; False when it is gone or silent.
        rendezvous: address of the store where an epoch's ranks meet.
        settle_s: how long to wait for further changes before making an epoch.
        patience_s: how long the very first epoch waits for the configured numbers of members.
    """

    def __init__(
        self,
        config: Config,
        layers: int,
        experts: int,
        alive: Callable[[Any], Awaitable[bool]],
        rendezvous: tuple[str, int],
        *,
        settle_s: float = 0.2,
        patience_s: float = 8.0,
    ) -> None:
        self.config, self._layers, self._experts = config, layers, experts
        self._alive, self._rendezvous = alive, rendezvous
        self._settle_s, self._patience_s = settle_s, patience_s
        self.members: dict[str, Record] = {}
        self.epoch: Epoch | None = None
        self.lost: set[int] = set()
        self.last_id, self._seq, self._last_join = 0, 0, time.monotonic()
        self.waiting_for = "members"
        self.history: list[dict[str, Any]] = []
        self._changed, self._progress = asyncio.Event(), asyncio.Event()
        self._made_seats: tuple[Any, ...] | None = None

    def join(
        self, info: MemberInfo, handle: Any, digest: str, epoch: dict[str, Any] | None
    ) -> None:
        """Take a member in. `epoch` is the one it is in, when a new controller is told of it.

        Raises:
            ConfigError: its configuration is another.
        """
        if digest != self.config.digest:
            raise ConfigError(
                f"{info.name} runs configuration {digest}, this cluster runs {self.config.digest}; "
                "start it with the same file"
            )
        if epoch is not None and (self.epoch is None or epoch["id"] > self.epoch.id):
            self.epoch = Epoch.from_dict(epoch)
            self.last_id = max(self.last_id, self.epoch.id)
        serves_in = epoch["id"] if epoch is not None else 0
        self.members[info.name] = Record(info, handle, prepared=serves_in, entered=serves_in)
        self._last_join = time.monotonic()
        self._changed.set()

    async def next_order(self, name: str, seen: int, wait_s: float = 5.0) -> Order | None:
        """Wait for an order newer than `seen`; None when none came, or the member is unknown."""
        record = self.members.get(name)
        if record is None:
            return Order(-1, "rest")
        if record.order.seq <= seen:
            record.changed.clear()
            try:
                await asyncio.wait_for(record.changed.wait(), wait_s)
            except TimeoutError:
                return None
        return record.order

    def prepared(self, name: str, epoch: int) -> None:
        """A member has loaded what an epoch needs."""
        if name in self.members:
            self.members[name].prepared = epoch
            self._progress.set()

    def entered(self, name: str, epoch: int) -> None:
        """A member serves in an epoch."""
        if name in self.members:
            self.members[name].entered = epoch
            self._progress.set()

    def report_lost(self, name: str, epoch: int, detail: str) -> None:
        """A member's fabric broke."""
        log.warning("epoch %d lost, says %s: %s", epoch, name, detail)
        if epoch not in self.lost and epoch >= (self.epoch.id if self.epoch else 0):
            self.lost.add(epoch)
            self._note("lost", epoch, detail)
        self._changed.set()
        self._progress.set()

    async def leave(self, name: str, wait_s: float = 20.0) -> None:
        """Let a member go; returns when an epoch without it serves, or nothing can be done."""
        record = self.members.get(name)
        if record is None:
            return
        record.leaving = True
        self._changed.set()
        end = time.monotonic() + wait_s
        while time.monotonic() < end and self._seated(name):
            await asyncio.sleep(0.02)
        self.members.pop(name, None)
        self._changed.set()

    async def run(self) -> None:
        """Make epochs as changes come; never returns."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._reconcile()
            except Exception:
                log.exception("making an epoch failed; trying again")
                await asyncio.sleep(0.5)
                self._changed.set()

    async def watch(self, period_s: float = 2.0) -> None:
        """Ask members for signs of life now and then; never returns."""
        while True:
            await asyncio.sleep(period_s)
            await self._bury(list(self.members))

    async def _reconcile(self) -> None:
        broken = self.epoch is not None and self.epoch.id in self.lost
        if broken:
            assert self.epoch is not None
            await self._bury([s.name for s in self.epoch.members])
        else:
            await asyncio.sleep(self._settle_s)
        seats = self._next_seats()
        self.waiting_for = self._lacking(seats)
        if self.waiting_for:
            if self.epoch is None:
                self._again_in(0.25)
            return
        current = tuple((s.name, s.roles, s.stage) for s in seats)
        if not broken and self.epoch is not None and current == self._made_seats:
            return
        if not broken and self.epoch is not None and self._made_seats is None:
            # A restarted controller: members of the running epoch may still have to call in.
            if not {s.name for s in self.epoch.members} <= set(self.members) and self._fresh():
                self._again_in(0.25)
                return
            # They call in in any order; the seats of the running epoch keep theirs.
            running = {(s.name, s.roles, s.stage) for s in self.epoch.members}
            inside = all(self.members[s.name].entered == self.epoch.id for s in seats)
            if inside and set(current) == running:
                self._made_seats = current
                return
        await self._switch(self._make(seats), current)

    async def _switch(self, epoch: Epoch, current: tuple[Any, ...]) -> None:
        started = time.monotonic()
        self._tell({s.name for s in epoch.members}, "prepare", epoch)
        if not await self._all(epoch, "prepared", 600.0):
            self._changed.set()
            return
        old = {s.name for s in self.epoch.members} if self.epoch else set()
        committed = time.monotonic()
        self.epoch, self._made_seats = epoch, current
        self._tell({s.name for s in epoch.members}, "enter", epoch)
        self._tell(old - {s.name for s in epoch.members}, "rest", None)
        if not await self._all(epoch, "entered", 30.0):
            self.lost.add(epoch.id)
            await self._bury([s.name for s in epoch.members])
            self._changed.set()
            return
        now = time.monotonic()
        self._note(
            "serving",
            epoch.id,
            f"{len(epoch.members)} members; prepared in {committed - started:.3f} s, "
            f"switched in {now - committed:.3f} s",
        )

    def _make(self, seats: tuple[Seat, ...]) -> Epoch:
        self.last_id += 1
        shards = [s.name for s in seats if "expert" in s.roles]
        if self.epoch is None:
            placement = Placement.balanced(self._layers, self._experts, shards)
        else:
            placement = self.epoch.placement.moved_to(shards)
        own = any(s.roles == ("router",) for s in seats)
        return Epoch(
            self.last_id,
            seats,
            placement,
            "own" if own else "attention",
            self.config.digest,
            self.config.cluster.fabric,
            self._rendezvous,
        )

    def _next_seats(self) -> tuple[Seat, ...]:
        present = [r.info for r in self.members.values() if not r.leaving]
        return seat(self.config.topology, present)

    def _lacking(self, seats: tuple[Seat, ...]) -> str:
        # The first epoch waits a while for everybody, lest start-up makes one epoch a member.
        complete = self.epoch is None and self._fresh()
        return lacking(self.config.topology, seats, complete=complete)

    def _fresh(self) -> bool:
        return time.monotonic() - self._last_join < self._patience_s

    def _again_in(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._changed.set)

    def _tell(self, names: set[str], phase: Phase, epoch: Epoch | None) -> None:
        plain = epoch.to_dict() if epoch else None
        for name in names & set(self.members):
            self._seq += 1
            record = self.members[name]
            record.order = Order(self._seq, phase, plain)
            record.changed.set()

    async def _all(
        self, epoch: Epoch, what: Literal["prepared", "entered"], limit_s: float
    ) -> bool:
        """Wait until all seats have reported; False when one is gone or the epoch is lost."""
        end = time.monotonic() + limit_s
        while True:
            records = [self.members.get(s.name) for s in epoch.members]
            if any(r is None for r in records) or epoch.id in self.lost:
                return False
            if all(getattr(r, what) >= epoch.id for r in records):
                return True
            if time.monotonic() > end:
                return False
            self._progress.clear()
            try:
                await asyncio.wait_for(self._progress.wait(), 0.25)
            except TimeoutError:
                await self._bury([s.name for s in epoch.members])

    async def _bury(self, names: list[str]) -> None:
        """Drop members whose process is gone or silent."""
        known = [self.members[n] for n in names if n in self.members]
        living = await asyncio.gather(*(self._alive(record.handle) for record in known))
        for record in [r for r, alive in zip(known, living, strict=True) if not alive]:
            name = record.info.name
            if self.members.get(name) is not record:
                continue  # it left in good order while it was asked, and has ended since
            del self.members[name]
            self._note("gone", self.last_id, name)
            if self.epoch is not None and any(s.name == name for s in self.epoch.members):
                self.lost.add(self.epoch.id)
            self._changed.set()

    def _seated(self, name: str) -> bool:
        if self.epoch is None or self.epoch.id in self.lost:
            return False
        seats = self.epoch.members
        if any(s.name == name for s in seats):
            return True
        # The epoch without it must have begun on every other member.
        return any(
            self.members[s.name].entered < self.epoch.id for s in seats if s.name in self.members
        )

    def status(self) -> dict[str, Any]:
        """The epoch, its members, and what is awaited (None when requests are served)."""
        live = self.epoch is not None and self.epoch.id not in self.lost
        told = report(self.epoch, live, self.members)
        return {
            **told,
            "ready": told["ready"] and not self.waiting_for,
            "waiting_for": self.waiting_for or None,
            "config_digest": self.config.digest,
            "history": self.history[-20:],
        }

    def _note(self, event: str, epoch: int, detail: str) -> None:
        self.history.append({"time": time.time(), "event": event, "epoch": epoch, "detail": detail})
        del self.history[:-100]
