"""Known prefixes are not computed again, and nothing tells: the same bits, and no salt's for another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from whalepod.config import Config
from whalepod.engine.blocks import BlockPool
from whalepod.engine.local import SingleEngine, ThreadedEngine, open_engine
from whalepod.engine.payoff import Payoff
from whalepod.engine.prefix import Node, PrefixCache
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint

MODEL = Path(__file__).parent.parent / "models/demo"
BLOCK = 128
Output = dict[str, list[tuple[int, float]]]


def engine(**settings: Any) -> SingleEngine:
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": {"layout": "single"},
            "engine": {"max_batch": 4, "kv_tokens": 4096, **settings},
        }
    )
    with torch.inference_mode():
        return SingleEngine(config, Source(config.model, Checkpoint.open(MODEL)))


def request(name: str, ids: Iterable[int], tokens: int = 6, salt: str = "") -> Request:
    settings = Sampling(0.0) if len(name) % 2 else Sampling(0.8, 0.9, seed=3)
    return Request(name, tuple(ids), tokens, settings, (), True, (), salt)


def text(seed: int, length: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(3, 4000) for _ in range(length)]


def run(
    opened: SingleEngine | ThreadedEngine, todo: list[Request]
) -> tuple[Output, dict[str, int]]:
    out: Output = {}
    cached: dict[str, int] = {}
    with torch.inference_mode():
        for event in opened.run(todo):
            out.setdefault(event.request_id, []).append((event.token, event.logprob))
            cached[event.request_id] = event.cached
    return out, cached


def settled(opened: SingleEngine) -> bool:
    """Whether every block and slot is free or in the tree, and no snapshot is lost."""
    scheduler = opened.loop.scheduler
    scheduler.plan()
    tree = scheduler.prefixes
    blocks = scheduler.blocks.free + tree.idle == scheduler.blocks.size
    owned = sum(n.snapshot >= 0 for n in tree._nodes)
    total = opened.member.config.engine.prefix_snapshots
    return blocks and scheduler.slots.free == 4 and owned + len(tree._free) == total


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_hit_at_every_border_changes_no_bit(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Payoff, "choose", lambda self, running: self.drafts)
    warm, base = engine(draft_tokens=drafts, max_step_tokens=200), text(1, 600)
    run(warm, [request("first", base)])
    hits = set()
    for border in (BLOCK, 4 * BLOCK):
        for length in (border - 1, border, border + 1):
            for more in (0, 140):
                ids = base[:length] + text(length, more)
                name = f"{length}+{more}"
                cold, none = run(engine(prefix_snapshots=0), [request(name, ids)])
                found, cached = run(warm, [request(name, ids)])
                assert found == cold
                assert none[name] == 0
                assert cached[name] % BLOCK == 0
                assert cached[name] < len(ids)
                hits.add(cached[name])
    assert hits >= {0, BLOCK, 4 * BLOCK}
    assert settled(warm)


@pytest.mark.slow
def test_a_shared_prefix_is_computed_once_where_requests_part() -> None:
    opened, shared = engine(max_step_tokens=2048), text(2, 1000)
    cached = [
        run(opened, [request(f"r{i}", shared + text(10 + i, 60))])[1][f"r{i}"] for i in range(4)
    ]
    # The first has nothing; the second finds no snapshot where it parts and leaves one there.
    assert cached == [0, 0, 896, 896]
    assert opened.loop.scheduler.prefixes.hit_tokens == 2 * 896


@pytest.mark.slow
def test_a_turn_goes_on_from_the_one_before() -> None:
    opened = engine()
    ids = text(3, 300)
    out, _ = run(opened, [request("turn", ids, 100)])
    longer = ids + [token for token, _ in out["turn"]] + text(4, 20)
    found, cached = run(opened, [request("next", longer)])
    assert cached["next"] == 384
    assert found == run(engine(prefix_snapshots=0), [request("next", longer)])[0]


@pytest.mark.slow
def test_salts_share_nothing() -> None:
    opened, ids = engine(), text(5, 300)
    run(opened, [request("a", ids, salt="one")])
    assert run(opened, [request("b", ids, salt="two")])[1]["b"] == 0
    assert run(opened, [request("c", ids)])[1]["c"] == 0
    assert run(opened, [request("d", ids, salt="one")])[1]["d"] == 256


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [{"layout": "ep"}, {"experts": 2}, {"stages": 2, "experts": 1}, {"stages": 3, "experts": 2}],
    ids=str,
)
def test_every_layout_goes_on_from_what_is_known(topology: dict[str, Any]) -> None:
    shared = text(8, 2 * BLOCK)
    turns = [[*shared, *text(9, 40)], [*shared, *text(10, 150)], [*shared, *text(10, 290)]]
    wanted, _ = run(engine(prefix_snapshots=0), [request(f"{i}", t) for i, t in enumerate(turns)])
    with torch.inference_mode():
        config = Config.from_dict(
            {
                "model": {"path": str(MODEL)},
                "topology": topology,
                "engine": {"max_batch": 2, "kv_tokens": 2048, "max_step_tokens": 200},
            }
        )
        opened = open_engine(config, Source(config.model, Checkpoint.open(MODEL)))
        try:
            for i, ids in enumerate(turns):
                found, cached = run(opened, [request(f"{i}", ids)])
                assert found[f"{i}"] == wanted[f"{i}"], i
                assert cached[f"{i}"] == (0, 2 * BLOCK, 3 * BLOCK)[i]
        finally:
            opened.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_give_what_a_fresh_engine_gives(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Payoff, "choose", lambda self, running: self.drafts)
    rng = Random(seed)
    # Room for little: prefixes are evicted, snapshots reused, sequences preempted.
    opened = engine(kv_tokens=1280, prefix_snapshots=3, draft_tokens=seed, max_step_tokens=150)
    stems = [text(100 + i, 400) for i in range(3)]
    todo = []
    for i in range(14):
        ids = rng.choice(stems)[: rng.choice((100, 127, 128, 129, 256, 300, 400))]
        salt = rng.choice(("", "", "s"))
        todo.append(
            request(f"{i}", ids + text(i, rng.randrange(1, 90)), rng.randrange(1, 40), salt)
        )
    cancelled = {r.id for r in rng.sample(todo, 3)}
    events: list[TokenEvent] = []
    with torch.inference_mode():
        waiting = list(todo)
        while waiting or opened.loop.busy:
            for _ in range(min(len(waiting), rng.randrange(3))):
                opened.loop.submit(waiting.pop(0))
            opened.step()
            if rng.random() < 0.1 and cancelled:
                opened.loop.cancel(cancelled.pop())
            events += opened.events
            opened.events.clear()
    assert opened.loop.scheduler.prefixes.hit_tokens > 0
    fresh = engine(prefix_snapshots=0)
    for item in todo:
        got = [(e.token, e.logprob) for e in events if e.request_id == item.id and e.token >= 0]
        expected = run(fresh, [item])[0][item.id]
        whole = any(e.finish == "length" for e in events if e.request_id == item.id)
        assert got == (expected if whole else expected[: len(got)])
    assert settled(opened)


def path(cache: PrefixCache, *keys: int) -> list[Node]:
    nodes = []
    parent = cache.root("")
    for key in keys:
        parent = cache.extend(parent, (key,) * 2, cache.blocks.take(1)[0])
        nodes.append(parent)
    return nodes


def test_the_tree_keeps_what_is_held_and_gives_back_the_oldest_end() -> None:
    cache = PrefixCache(BlockPool(4), [8, 9], 2)
    first, second = path(cache, 1, 2), path(cache, 1, 3)
    # The shared block is kept once, its copy goes back.
    assert first[0] is second[0]
    assert (cache.blocks.free, cache.idle) == (1, 0)
    cache.evict(4)
    assert cache.blocks.free == 1
    cache.release(first)
    assert cache.idle == 1  # block 1 is still held by the second
    cache.release(second)
    assert cache.idle == 3
    cache.evict(1)
    assert [n.key for n in cache.match([1, 1, 3, 3, 0], "")] == [(1, 1), (3, 3)]
    cache.evict(9)
    assert (cache.blocks.free, cache.idle) == (4, 0)
    assert cache.match([1, 1, 3, 3, 0], "") == []


def test_a_salt_is_forgotten_with_its_last_block() -> None:
    cache = PrefixCache(BlockPool(4), [], 2)
    for i in range(50):
        salt = f"tenant {i}"
        assert cache.match([1, 1, 2], salt) == []
        node = cache.extend(cache.root(salt), (1, 1), cache.blocks.take(1)[0])
        assert cache.match([1, 1, 2], salt) == [node]
        cache.release([node])
        cache.evict(1)
        assert cache.match([1, 1, 2], salt) == []
    assert len(cache._roots) == len(cache._salts) == 0


def test_a_match_leaves_a_token_to_compute() -> None:
    cache = PrefixCache(BlockPool(4), [], 2)
    path(cache, 1, 2)
    assert len(cache.match([1, 1, 2, 2], "")) == 1
    assert len(cache.match([1, 1, 2, 2, 7], "")) == 2
    assert cache.match([1, 1, 2, 2, 7], "other") == []


def test_snapshots_go_to_the_recently_used_but_never_from_under_a_reader() -> None:
    cache = PrefixCache(BlockPool(4), [8, 9], 2)
    one, two = path(cache, 1, 2)
    cache.attach(one, cache.reserve(()))
    cache.attach(two, cache.reserve(()))
    kept = two.snapshot
    assert cache.reserve({one.snapshot, kept}) == -1
    taken = cache.reserve({kept})
    assert taken not in (-1, kept)
    assert one.snapshot == -1
    cache.give_back([taken])
    assert cache.reserve({kept}) == taken


def test_the_snapshot_that_saves_least_goes_first_and_age_wins_in_the_end() -> None:
    cache = PrefixCache(BlockPool(64), [7, 8, 9], 2)
    long, short = path(cache, 1, 2, 3, 4, 5), path(cache, 9)
    cache.attach(long[4], cache.reserve(()))  # five blocks would have to be computed again
    cache.attach(short[0], cache.reserve(()))  # one
    cache.attach(long[0], cache.reserve(()))  # one
    cache.hold(short)
    cache.hold(long[:1])  # both used since the long one
    cache.give_back([cache.reserve(())])
    assert short[0].snapshot == -1
    assert min(long[4].snapshot, long[0].snapshot) >= 0
    # Others come and go; each takes the level up by what it cost, until the long one is lowest.
    for key in range(20, 40):
        (node,) = path(cache, key)
        cache.attach(node, cache.reserve(()))
    assert long[4].snapshot == -1


def test_blocks_without_a_snapshot_go_before_any_with_one() -> None:
    cache = PrefixCache(BlockPool(4), [8, 9], 2)
    other, kept = path(cache, 7), path(cache, 1)
    for nodes in (other, kept):
        cache.attach(nodes[0], cache.reserve(()))
    cache.give_back([cache.reserve(())])  # the other's, as old as what is kept is worth
    tail = path(cache, 2, 3)
    for nodes in (other, kept, tail):
        cache.release(nodes)
    cache.evict(3)
    assert cache.match([2, 2, 0], "") == cache.match([7, 7, 0], "") == []
    assert len(cache.match([1, 1, 0], "")) == 1
    cache.evict(1)
    assert cache.match([1, 1, 0], "") == []
