"""The controller's decisions, with members that are coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.membership import Membership
from whalepod.cluster.topology import MemberInfo, Pool
from whalepod.config import Config
from whalepod.errors import ConfigError

CONFIG = Config.from_dict({"model": {"path": "m"}, "topology": {"attention": 1, "experts": 2}})


class Fake:
    """A member that follows its orders and remembers them."""

    def __init__(self, membership: Membership, name: str, pool: Pool) -> None:
        self.membership, self.info = membership, MemberInfo(name, pool)
        self.alive, self.log, self.epoch = True, list[tuple[str, int]](), 0
        self.silent_in: str | None = None
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        membership.join(self.info, self, CONFIG.digest, None)
        self.task = asyncio.create_task(self.follow())

    async def follow(self) -> None:
        seen = 0
        while self.alive:
            order = await self.membership.next_order(self.info.name, seen, 0.2)
            if order is None:
                continue
            if order.seq < 0:
                return
            seen = order.seq
            epoch = Epoch.from_dict(order.epoch).id if order.epoch else 0
            self.log.append((order.phase, epoch))
            if order.phase == self.silent_in:
                return
            if order.phase == "prepare":
                self.membership.prepared(self.info.name, epoch)
            elif order.phase == "enter":
                self.epoch = epoch
                self.membership.entered(self.info.name, epoch)

    def die(self) -> None:
        self.alive = False


async def answers(fake: Fake) -> bool:
    fake.asked.set()
    await fake.may_answer.wait()
    return fake.alive


def scenario(body: Callable[[Membership], Awaitable[None]]) -> None:
    async def run() -> None:
        membership = Membership(CONFIG, 3, 8, answers, ("h", 1), settle_s=0.01, patience_s=0.3)
        task = asyncio.create_task(membership.run())
        try:
            await asyncio.wait_for(body(membership), 10)
        finally:
            task.cancel()

    asyncio.run(run())


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await asyncio.sleep(0.01)


async def started(membership: Membership) -> dict[str, Fake]:
    pools: dict[str, Pool] = {"a": "attention", "r": "router", "x": "experts", "y": "experts"}
    members = {name: Fake(membership, name, pool) for name, pool in pools.items()}
    await until(lambda: membership.status()["ready"])
    return members


def test_the_first_epoch_waits_for_everybody_and_prepares_before_it_enters() -> None:
    async def body(membership: Membership) -> None:
        Fake(membership, "a", "attention")
        Fake(membership, "x", "experts")
        await asyncio.sleep(0.1)
        assert membership.status()["epoch"] == 0
        assert "more" in membership.status()["waiting_for"]
        members = await started(membership)
        assert membership.status()["epoch"] == 1
        assert members["y"].log == [("prepare", 1), ("enter", 1)]
        assert membership.epoch is not None
        assert not membership.epoch.placement.missing(["x", "y"])

    scenario(body)


def test_after_a_while_it_starts_with_what_there_is() -> None:
    async def body(membership: Membership) -> None:
        Fake(membership, "a", "attention")
        Fake(membership, "x", "experts")
        await until(lambda: membership.status()["ready"])
        assert membership.epoch is not None
        assert membership.epoch.router == "attention"

    scenario(body)


def test_joins_and_leaves_make_epochs_and_leave_returns_after_the_switch() -> None:
    async def body(membership: Membership) -> None:
        members = await started(membership)
        Fake(membership, "z", "experts")
        await until(lambda: membership.status()["epoch"] == 2 and membership.status()["ready"])
        assert members["x"].log[-2:] == [("prepare", 2), ("enter", 2)]
        await membership.leave("x", 5)
        assert membership.status()["epoch"] == 3
        assert all(members[m].epoch == 3 for m in ("a", "r", "y"))
        assert members["x"].log[-1] == ("rest", 0)
        assert membership.epoch is not None
        assert not membership.epoch.placement.missing(["y", "z"])

    scenario(body)


def test_who_leaves_while_asked_for_a_sign_of_life_is_not_lost() -> None:
    async def body(membership: Membership) -> None:
        members = await started(membership)
        x = members["x"]
        x.may_answer.clear()
        x.asked.clear()
        watch = asyncio.create_task(membership.watch(0.01))
        await x.asked.wait()
        await membership.leave("x")
        x.die()
        x.may_answer.set()
        members["y"].asked.clear()
        await members["y"].asked.wait()  # the round in which x was asked has ended
        watch.cancel()
        assert [e["event"] for e in membership.history] == ["serving", "serving"]
        assert membership.status()["ready"]
        assert not membership.lost

    scenario(body)


def test_a_lost_epoch_is_made_again_without_the_dead() -> None:
    async def body(membership: Membership) -> None:
        members = await started(membership)
        members["y"].die()
        membership.report_lost("a", 1, "y stopped answering")
        assert not membership.status()["ready"]
        await until(lambda: members["a"].epoch == 2)
        assert membership.epoch is not None
        assert membership.epoch.names == ("a", "r", "x")
        assert not membership.epoch.placement.missing(["x"])
        events = [h["event"] for h in membership.status()["history"]]
        assert events == ["serving", "lost", "gone", "serving"]

    scenario(body)


def test_losing_the_last_expert_waits_for_another() -> None:
    async def body(membership: Membership) -> None:
        members = await started(membership)
        members["x"].die()
        members["y"].die()
        membership.report_lost("a", 1, "both gone")
        await until(lambda: membership.status()["waiting_for"] == "an expert member")
        Fake(membership, "z", "experts")
        await until(lambda: membership.status()["ready"])
        assert members["a"].epoch == 2

    scenario(body)


def test_a_member_that_dies_while_preparing_does_not_hold_the_others_up() -> None:
    async def body(membership: Membership) -> None:
        await started(membership)
        late = Fake(membership, "z", "experts")
        late.silent_in = "prepare"
        await until(lambda: late.log == [("prepare", 2)])
        late.die()
        await until(lambda: membership.status()["ready"] and "z" not in membership.members)
        assert membership.epoch is not None
        assert "z" not in membership.epoch.names

    scenario(body)


def test_a_restarted_controller_adopts_the_running_epoch() -> None:
    async def body(membership: Membership) -> None:
        await started(membership)
        assert membership.epoch is not None
        running: dict[str, Any] = membership.epoch.to_dict()
        fresh = Membership(CONFIG, 3, 8, answers, ("h", 1), settle_s=0.01, patience_s=0.3)
        task = asyncio.create_task(fresh.run())
        infos = [record.info for record in membership.members.values()]
        for info in infos:
            fake = Fake.__new__(Fake)
            fake.alive = True
            fresh.join(info, fake, CONFIG.digest, running)
        await asyncio.sleep(0.3)
        assert fresh.epoch == membership.epoch
        Fake(fresh, "z", "experts")
        await until(lambda: fresh.last_id == 2)
        task.cancel()

    scenario(body)


def test_another_configuration_is_refused_and_strangers_are_told_to_join() -> None:
    async def body(membership: Membership) -> None:
        with pytest.raises(ConfigError, match="start it with the same file"):
            membership.join(MemberInfo("q", "experts"), None, "other", None)
        order = await membership.next_order("q", 0)
        assert order is not None
        assert order.seq == -1

    scenario(body)
