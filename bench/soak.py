"""What is left after many random requests through one engine, a fifth of them cancelled.

    python bench/soak.py --requests 10000

Requests differ in length, priority, settings, salt and stop tokens; some share prefixes, some are
cancelled at a random moment (before they are taken in, waiting, in their prompt, decoding), and some
have a deadline that passes. Afterwards every block, slot (a slot is a ring in every layer), snapshot,
file descriptor and thread must be free again, and memory as it was after the first tenth. Writes
`bench/results/soak.md` when asked to; exits with 1 where something is left.
"""

from __future__ import annotations

import argparse
import gc
import os
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import heading

from whalepod.config import Config
from whalepod.engine.local import SingleEngine, ThreadedEngine, open_engine
from whalepod.engine.loop import EngineLoop
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.session import FirstStage
from whalepod.engine.source import Source
from whalepod.errors import WhalepodError
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tiny import make_tiny

LAYOUTS = {"single": {"layout": "single"}, "afd": {"layout": "afd", "attention": 2, "experts": 2}}
SIZES = {"max_batch": 16, "kv_tokens": 6144, "prefix_snapshots": 8, "draft_tokens": 1}
# Requests under way at once, and how much more memory than after a tenth is still flat.
ALIVE, FLAT = 40, 0.03


@dataclass(frozen=True)
class Look:
    """What the process and the engine hold at one moment."""

    done: int
    seconds: float
    resident_mib: float
    files: int
    threads: int
    live: int
    blocks_held: int
    slots_held: int
    snapshots_lost: int
    blocks_known: int


@dataclass
class Soak:
    """Feeds an engine and counts how requests end."""

    engine: SingleEngine | ThreadedEngine
    rng: Random
    vocabulary: int
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    _alive: dict[str, EngineLoop] = field(default_factory=dict)
    _cancels: dict[str, int] = field(default_factory=dict)
    _stems: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Draw the prefixes that requests share."""
        self._stems = [self._text(300) for _ in range(6)]

    @property
    def loops(self) -> list[EngineLoop]:
        """Of every attention member."""
        if isinstance(self.engine, SingleEngine):
            return [self.engine.loop]
        return [m.loop for m in self.engine.firsts if m.loop is not None]

    def run(self, first: int, last: int) -> None:
        """Run the requests of these numbers to their ends."""
        number = first
        while number < last or self._alive:
            while number < last and len(self._alive) < ALIVE:
                self._submit(number)
                number += 1
            for event in self._events():
                self._take(event)
            for name in [n for n, left in self._cancels.items() if left <= 0]:
                del self._cancels[name]
                if name in self._alive:
                    self._alive[name].cancel(name)
            for name in self._cancels:
                self._cancels[name] -= 1
        if isinstance(self.engine, SingleEngine):
            self.engine.step()  # what the last step had reserved is given back by the next one
        else:
            time.sleep(2 * FirstStage.keepalive_s)

    def _submit(self, number: int) -> None:
        rng, name = self.rng, str(number)
        stem = rng.choice(self._stems)[: rng.choice((0, 0, 60, 128, 256, 300))]
        request = Request(
            name,
            tuple(stem + self._text(rng.randint(1, 60))),
            rng.randint(1, 24),
            Sampling(rng.choice((0.0, 0.8)), seed=number),
            (rng.randrange(self.vocabulary),),
            cache_salt=rng.choice(("", "", "", name)),
            priority=rng.choice((0, 0, 0, 1)),
            timeout_s=rng.uniform(0.0, 0.5) if rng.random() < 0.05 else None,
        )
        loop = rng.choice(self.loops)
        loop.submit(request)
        self._alive[name] = loop
        if rng.random() < 0.28:
            self._cancels[name] = rng.choice((0, rng.randint(1, 30)))
            self.ends["to be cancelled"] += 1

    def _events(self) -> list[TokenEvent]:
        if isinstance(self.engine, SingleEngine):
            self.engine.step()
            events = list(self.engine.events)
            self.engine.events.clear()
            return events
        try:
            event = self.engine.events.get(timeout=0.02)
        except queue.Empty:
            return []
        if isinstance(event, WhalepodError):
            raise event
        return [event]

    def _take(self, event: TokenEvent) -> None:
        self.tokens += event.token >= 0
        if event.finish is not None:
            self.ends[event.finish] += 1
            del self._alive[event.request_id]

    def _text(self, length: int) -> list[int]:
        return [self.rng.randrange(3, self.vocabulary) for _ in range(length)]

    def look(self, done: int, begun: float) -> Look:
        """Count what is held now."""
        gc.collect()
        schedulers = [loop.scheduler for loop in self.loops]
        trees = [s.prefixes for s in schedulers]
        kept = sum(sum(n.snapshot >= 0 for n in t._nodes) + len(t._free) for t in trees)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Look(
            done,
            time.perf_counter() - begun,
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            sum(loop.load for loop in self.loops),
            sum(s.blocks.size - s.blocks.free for s in schedulers) - sum(t.idle for t in trees),
            sum(s.slots.size - s.slots.free for s in schedulers),
            SIZES["prefix_snapshots"] * len(trees) - kept,
            sum(t.idle for t in trees),
        )


def faults(looks: list[Look], ends: Counter[str], requests: int) -> list[str]:
    """What is not as it should be, in words."""
    first, last = looks[0], looks[-1]
    finished = sum(ends[kind] for kind in ("stop", "length", "abort", "deadline"))
    found = [] if finished == requests else [f"{finished} of {requests} requests ended well"]
    for look in looks:
        held = (look.live, look.blocks_held, look.slots_held, look.snapshots_lost)
        if any(held):
            found.append(f"after {look.done}: {held} requests, blocks, slots, snapshots are held")
    if (last.files, last.threads) != (first.files, first.threads):
        found.append(f"files and threads grew from {first.files}, {first.threads}")
    if last.resident_mib > first.resident_mib * (1 + FLAT):
        found.append(f"memory grew from {first.resident_mib:.0f} to {last.resident_mib:.0f} MiB")
    return found


def soak(folder: Path, layout: str, requests: int) -> tuple[list[Look], Soak]:
    """Run it, and look after a tenth, a half and all."""
    config = Config.from_dict(
        {"model": {"path": str(folder)}, "topology": LAYOUTS[layout], "engine": SIZES}
    )
    source = Source(config.model, Checkpoint.open(folder))
    with torch.inference_mode():
        opened = open_engine(config, source)
        run = Soak(opened, Random(0), source.config.vocab_size)
        begun, looks, done = time.perf_counter(), [], 0
        for upto in (requests // 10, requests // 2, requests):
            run.run(done, upto)
            done = upto
            looks.append(run.look(done, begun))
            print(looks[-1], file=sys.stderr, flush=True)
        opened.close()
    return looks, run


def table(looks: list[Look], run: Soak) -> list[str]:
    """Markdown."""
    names = list(Look.__dataclass_fields__)
    lines = [
        "| " + " | ".join(n.replace("_", " ") for n in names) + " |",
        "|---" * len(names) + "|",
    ]
    for look in looks:
        values = (getattr(look, n) for n in names)
        lines.append("| " + " | ".join(f"{v:.0f}" for v in values) + " |")
    loops = run.loops
    told = {
        **run.ends,
        "tokens": run.tokens,
        "steps": sum(loop.counters.steps for loop in loops),
        "preemptions": sum(loop.scheduler.preemptions for loop in loops),
        "prompt tokens found": sum(loop.scheduler.prefixes.hit_tokens for loop in loops),
    }
    return [*lines, "", ", ".join(f"{k} {v}" for k, v in told.items()) + "."]


def main() -> None:
    """Soak, print a table, and write it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the random tiny model")
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="single")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or make_tiny(Path(tempfile.mkdtemp()) / "tiny")
    told = heading(f"python bench/soak.py --requests {options.requests} --layout {options.layout}")
    looks, run = soak(folder, options.layout, options.requests)
    wrong = faults(looks, run.ends, options.requests)
    text = "\n".join([told, "", *table(looks, run), "", *wrong, ""])
    print(text)
    if options.out:
        options.out.write_text(f"# Soak\n\n{text}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
