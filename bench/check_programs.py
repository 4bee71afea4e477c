"""Random programs of requests on an engine, against a model that recomputes everything from scratch.

    python bench/check_programs.py --programs 1000

A program is a fresh engine with sizes drawn by lot (a pool so small that sequences give way to each
other, few snapshots, small steps) and requests that come, are cancelled, go on from an earlier
prompt with its answer, and ask an earlier prompt again; prompts end at block borders and one token
beside them; priorities, salts, settings, drafts and steps that are broken off come by lot too.
Drafts are the MTP block's, and where an earlier answer to the same prompt is known half of them are
taken from that, so that right and wrong ones come. Each answer is compared with the draws that
`WholeModel` gives in one pass over prompt and answer, which shares no cache, scheduler or chunking.
Writes `bench/results/programs.md` when asked to; exits with 1 on any difference or leak.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import heading

from whalepod.config import Config
from whalepod.engine.drafter import Drafter
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Adjust, Request, Sampling, TokenEvent
from whalepod.engine.sampler import sample
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tiny import make_tiny
from whalepod.model.whole import WholeModel

BLOCK, LONGEST = 128, 300
Answer = list[tuple[int, float]]


def open_reference(folder: Path) -> WholeModel:
    """The model that computes from scratch."""
    checkpoint = Checkpoint.open(folder)
    return WholeModel(checkpoint.config, checkpoint.everything(), slots=1, blocks=8)


def recomputed(model: WholeModel, request: Request, answer: Answer) -> Answer:
    """What the model draws at each place of an answer, in one pass over prompt and answer."""
    ids = [*request.prompt_ids, *(token for token, _ in answer)]
    first, count = len(request.prompt_ids), len(answer)
    state = model.new_state(len(ids))
    logits = model.forward(state, ids[:-1])[first - 1 :]
    model.release(state)
    histories = None
    if request.sampling.adjust is not None:
        histories = [(first, tuple(ids[: first + i])) for i in range(count)]
    positions = list(range(first, first + count))
    drawn = sample(logits, [request.sampling] * count, positions, histories)
    return [(d.token, d.logprob) for d in drawn]


@dataclass
class Book:
    """What a program's requests were and got."""

    requests: dict[str, Request] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    finishes: dict[str, str] = field(default_factory=dict)

    def take(self, events: list[TokenEvent]) -> None:
        """Note events down."""
        for event in events:
            if event.token >= 0:
                self.answers[event.request_id].append((event.token, event.logprob))
            if event.finish is not None:
                self.finishes[event.request_id] = event.finish
        events.clear()

    @property
    def done(self) -> list[str]:
        """Requests that have their whole answer."""
        return [name for name, finish in self.finishes.items() if finish in ("stop", "length")]

    def known(self, tokens: list[int]) -> list[int]:
        """What followed these tokens in an earlier answer."""
        for name in self.done:
            whole = [*self.requests[name].prompt_ids, *(t for t, _ in self.answers[name])]
            if len(whole) > len(tokens) and whole[: len(tokens)] == tokens:
                return whole[len(tokens) :]
        return []


class Writer:
    """Draws requests: prompts that share stems, at block borders and beside them."""

    def __init__(self, rng: Random, vocabulary: int, book: Book) -> None:
        self.rng, self.vocabulary, self.book = rng, vocabulary, book
        self.stems = [self._text(LONGEST) for _ in range(2)]

    def request(self, name: str) -> Request:
        """A new one, one that goes on from an earlier one, or an earlier one again."""
        rng, done = self.rng, self.book.done
        how = rng.random()
        if done and how < 0.25:
            return self._follow_up(name, rng.choice(done))
        if done and how < 0.45:
            return replace(self.book.requests[rng.choice(done)], id=name)
        border = BLOCK * rng.randint(1, 2) + rng.choice((-1, 0, 1))
        ids = rng.choice(self.stems)[: rng.choice((border, border, rng.randint(1, 60)))]
        ids = ids + self._text(rng.choice((0, 1, rng.randint(2, 80))))
        return Request(
            name,
            tuple(ids[:LONGEST]),
            rng.randint(1, 20),
            self._sampling(),
            (rng.randrange(self.vocabulary),) if rng.random() < 0.3 else (),
            cache_salt=rng.choice(("", "", "", "other")),
            priority=rng.choice((0, 0, 1, -1)),
        )

    def _follow_up(self, name: str, before: str) -> Request:
        old = self.book.requests[before]
        ids = [*old.prompt_ids, *(t for t, _ in self.book.answers[before])]
        ids += self._text(self.rng.randint(0, 40))
        return replace(old, id=name, prompt_ids=tuple(ids[:LONGEST]), sampling=self._sampling())

    def _sampling(self) -> Sampling:
        rng = self.rng
        adjust = None
        if rng.random() < 0.3:
            few = tuple(sorted(rng.sample(range(3, self.vocabulary), 5)))
            adjust = Adjust(rng.uniform(0, 1), 0.1, rng.choice((1.0, 1.2)), banned=few)
        return Sampling(
            rng.choice((0.0, 0.7, 1.1)),
            rng.choice((1.0, 0.9)),
            rng.choice((0, 20)),
            rng.randrange(1 << 60),
            rng.choice((0.0, 0.05)),
            adjust,
        )

    def _text(self, length: int) -> list[int]:
        return [self.rng.randrange(3, self.vocabulary) for _ in range(length)]


def sizes(rng: Random) -> dict[str, Any]:
    """Room for little, by lot."""
    return {
        "max_batch": rng.choice((1, 2, 3, 4, 5, 6)),
        "max_queue": 64,
        "kv_tokens": BLOCK * rng.choice((3, 3, 4, 5, 7)),
        "prefix_snapshots": rng.choice((0, 2, 4, 6)),
        "draft_tokens": rng.randint(0, 3),
        "max_step_tokens": rng.choice((9, 30, 60, 150, 400)),
    }


def help_drafts(engine: SingleEngine, book: Book, rng: Random) -> None:
    """Take some drafts from what is known, so that right ones come; how many at once is by lot."""
    assert engine.member.stage is not None
    drafter, loop = engine.member.stage.drafter, engine.loop
    loop.payoff.choose = lambda running: rng.randint(0, loop.payoff.drafts)  # type: ignore[method-assign]
    if drafter is None:
        return
    own = Drafter.propose

    def propose(batch: Any, x: Any, emitted: dict[int, list[int]], count: int) -> dict[int, Any]:
        drafts = own(drafter, batch, x, emitted, count)
        for sequence in (s for s in loop.scheduler.running if s.slot in drafts):
            known = book.known([*sequence.tokens, *emitted[sequence.slot]])
            if rng.random() < 0.8:
                drafts[sequence.slot][: len(known)] = known[:count]
        return drafts

    drafter.propose = propose  # type: ignore[method-assign]


def run_program(seed: int, source: Source, count: int) -> tuple[Book, Counter[str]]:
    """Run one program to its end; also what happened in it."""
    rng, book = Random(seed), Book()
    folder = str(source.checkpoint.path)
    engine_sizes = sizes(rng)
    config = Config.from_dict(
        {"model": {"path": folder}, "topology": {"layout": "single"}, "engine": engine_sizes}
    )
    engine, happened = SingleEngine(config, source), Counter[str]()
    help_drafts(engine, book, rng)
    writer = Writer(rng, source.config.vocab_size, book)
    while len(book.requests) < count or engine.loop.busy:
        if len(book.requests) < count:
            for _ in range(min(rng.randint(1, 4), count - len(book.requests))):
                item = writer.request(f"{len(book.requests)}")
                book.requests[item.id], book.answers[item.id] = item, []
                engine.loop.submit(item)
        for _ in range(rng.randint(1, 60)):
            if rng.random() < 0.03:
                happened["broken-off steps"] += engine.loop.plan(1) is not None
            engine.step()
            book.take(engine.events)
            alive = sorted(set(book.requests) - set(book.finishes))
            if alive and rng.random() < 0.02:
                engine.loop.cancel(rng.choice(alive))
    engine.loop.plan(1)  # leaves the last sequences' blocks in the tree
    happened += totals(engine)
    return book, happened


def totals(engine: SingleEngine) -> Counter[str]:
    """What an engine has counted, and what it has not got back."""
    scheduler, counters = engine.loop.scheduler, engine.loop.counters
    tree = scheduler.prefixes
    slots = engine.member.config.engine.prefix_snapshots
    kept = sum(node.snapshot >= 0 for node in tree._nodes) + len(tree._free)
    return Counter(
        {
            "steps": counters.steps,
            "preemptions": scheduler.preemptions,
            "prompt tokens found": tree.hit_tokens,
            "drafts verified": counters.drafted,
            "drafts right": counters.accepted,
            "leaked": (scheduler.blocks.size - scheduler.blocks.free - tree.idle)
            + (scheduler.slots.size - scheduler.slots.free)
            + (slots - kept),
        }
    )


def judge(model: WholeModel, book: Book) -> Counter[str]:
    """Count what was compared and what differs."""
    found: Counter[str] = Counter()
    for name, request in book.requests.items():
        answer, finish = book.answers[name], book.finishes[name]
        found["requests"] += 1
        found["cancelled"] += finish == "abort"
        stopped = bool(answer) and answer[-1][0] in request.stop_ids
        whole = len(answer) == request.max_tokens or stopped
        found["wrong ends"] += finish not in ("abort", "stop", "length")
        found["wrong ends"] += finish in ("stop", "length") and not whole
        if not answer:
            continue
        expected = recomputed(model, request, answer)
        pairs = list(zip(answer, expected, strict=True))
        found["tokens compared"] += len(pairs)
        found["other tokens"] += sum(a[0] != b[0] for a, b in pairs)
        found["other log-probabilities"] += sum(a[1] != b[1] for a, b in pairs)
    return found


FAULTS = ("other tokens", "other log-probabilities", "wrong ends", "leaked")
ROWS = ("requests", "cancelled", "steps", "broken-off steps", "preemptions", "prompt tokens found")
DRAFTS = ("drafts verified", "drafts right", "tokens compared")


def main() -> None:
    """Run the programs, print a table, and write it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the random tiny model")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=8, help="of one program")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or make_tiny(Path(tempfile.mkdtemp()) / "tiny")
    config = Config.from_dict({"model": {"path": str(folder)}})
    source, model = Source(config.model, Checkpoint.open(folder)), open_reference(folder)
    told = heading(f"python bench/check_programs.py --programs {options.programs}")
    total, begun = Counter[str](), time.perf_counter()
    with torch.inference_mode():
        for seed in range(options.seed, options.seed + options.programs):
            book, happened = run_program(seed, source, options.requests)
            found = judge(model, book) + happened
            total += found
            if (seed - options.seed) % 100 == 99:
                print(f"{seed + 1 - options.seed} programs", file=sys.stderr, flush=True)
            if any(found[name] for name in FAULTS):
                print(f"program {seed}: {dict(found)}", file=sys.stderr, flush=True)
    wrong = sum(abs(total[name]) for name in FAULTS)
    lines = ["| what | count |", "|---|---|", f"| programs | {options.programs} |"]
    lines += [f"| {name} | {total[name]} |" for name in (*ROWS, *DRAFTS, *FAULTS)]
    took = f"{time.perf_counter() - begun:.0f} s on one thread."
    text = "\n".join([told, "", took, "", *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(f"# Random programs against a model from scratch\n\n{text}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
