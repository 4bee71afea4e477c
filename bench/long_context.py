"""One request with a very long context: time, memory and recall by length.

    python bench/long_context.py --tokens 65536
    python bench/long_context.py --tokens 1048576 --threads 2

Requests of growing length share their beginning, so each goes on from the one before (which also
takes the prefix cache to these lengths). A fact stands at the start of the shortest; every request
asks for it. Writes `bench/results/long_context-<device>-<tokens>.md`.

Memory: the bytes of the blocks that a request holds, from the tensors the cache allocated, beside
what the model's layers need by their ratios. Decoding: seconds a token beside the line through the
shortest and the longest context over the bytes that a step reads.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo.documents.recall import Fact, facts, stories
from machine import heading

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.chat import Message, render
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.shape import ModelConfig
from whalepod.model.tokenizer import Tokenizer

MODEL, OUTPUT, STEP = Path("models/demo"), 24, 512


@dataclass(frozen=True, slots=True)
class Reading:
    """What one request showed."""

    tokens: int
    cached: int
    prefill_s: float
    decode_s: float
    held: int
    needed: float
    answer: str


class Text:
    """A fact, then stories without end; the question comes at the end of each request."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        rng = Random(7)
        self.tokenizer = tokenizer
        self.fact: Fact = facts(rng, 1)[0]
        first, last = render([Message("user", "\0")], False, tokenizer), tokenizer.encode_text("\0")
        cut = next(i for i in range(len(first)) if first[i : i + len(last)] == last)
        self._closing = first[cut + len(last) :]
        fill = stories(rng)
        self.ids = first[:cut] + tokenizer.encode_text(f"{self.fact.said} ")
        while len(self.ids) < length:
            self.ids += tokenizer.encode_text(fill(4000) + " ")

    def prompt(self, length: int) -> tuple[int, ...]:
        """The first tokens and the question, `length` in all."""
        end = [*self.tokenizer.encode_text(f" {self.fact.asked}"), *self._closing]
        return (*self.ids[: length - len(end)], *end)


def open_engine(tokens: int, device: str) -> SingleEngine:
    """An engine with room for one such request and the prefix before it."""
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": {"layout": "single"},
            "engine": {
                "max_batch": 1,
                "max_context": tokens + 128,
                "kv_tokens": tokens + 4 * 128,
                "max_step_tokens": STEP,
                "prefix_snapshots": 4,
            },
        }
    )
    return SingleEngine(config, Source(config.model, Checkpoint.open(MODEL), device))


def needed_bytes(model: ModelConfig, tokens: int, itemsize: int) -> float:
    """Compressed entries that a request of this length has, by the ratios of the layers."""
    total = 0.0
    for layer in model.layers:
        ratio = model.ratio(layer)
        if ratio:
            width = model.head_dim + (model.index_head_dim if model.kind(layer) == "csa" else 0)
            total += tokens // ratio * width * itemsize
    return total


def read_bytes(model: ModelConfig, tokens: int, itemsize: int) -> float:
    """What decoding one token reads of a context: all index keys and HCA entries, the chosen ones."""
    total = 0.0
    for layer in model.layers:
        ratio, kind = model.ratio(layer), model.kind(layer)
        if kind == "csa":
            chosen = min(model.index_topk, tokens // ratio)
            total += (tokens // ratio * model.index_head_dim + chosen * model.head_dim) * itemsize
        elif kind == "hca":
            total += tokens // ratio * model.head_dim * itemsize
    return total


def block_bytes(engine: SingleEngine) -> float:
    """Bytes of one block in all pools, from the tensors themselves."""
    assert engine.member.stage is not None
    cache = engine.member.stage.cache
    pools = [p for c in cache.layers.values() for p in (c.main, c.index) if p is not None]
    return sum(p.stored.nbytes for p in pools) / cache.blocks


def run(engine: SingleEngine, text: Text, length: int) -> Reading:
    """Ask once at this length."""
    request = Request(str(length), text.prompt(length), OUTPUT, Sampling(0.0), (), True)
    engine.loop.submit(request)
    begun, times, ids, held, cached = time.perf_counter(), [], [], 0, 0
    while engine.loop.busy:
        engine.step()
        if engine.events:
            times.append(time.perf_counter())
            ids += [e.token for e in engine.events]
            cached = engine.events[0].cached
            engine.events.clear()
            running = engine.loop.scheduler.running
            held = max([held, *(len(s.blocks) for s in running)])
        elif engine.loop.counters.steps % 128 == 0:
            known = engine.loop.scheduler.running[0].computed
            print(f"  {known} tokens, {time.perf_counter() - begun:.0f} s", flush=True)
    assert engine.member.stage is not None
    model, itemsize = engine.member.model, engine.member.stage.dtype.itemsize
    total = length + OUTPUT
    return Reading(
        length,
        cached,
        times[0] - begun,
        (times[-1] - times[0]) / (len(times) - 1),
        round(held * block_bytes(engine)),
        needed_bytes(model, total, itemsize),
        text.tokenizer.decode(ids).split(".")[0] + ".",
    )


def report(
    readings: list[Reading], text: Text, model: ModelConfig, device: str, threads: int
) -> str:
    """The page."""
    first, last = readings[0], readings[-1]
    reads = {r.tokens: read_bytes(model, r.tokens, 4) for r in readings}
    slope = (last.decode_s - first.decode_s) / (reads[last.tokens] - reads[first.tokens])
    where = torch.cuda.get_device_name() if device == "cuda" else f"threads: {threads}"
    lines = [
        f"# A context of {last.tokens:,} tokens on {device}",
        "",
        heading(
            f"python bench/long_context.py --tokens {last.tokens} --device {device} "
            f"--threads {threads}"
        ),
        "",
        f"The demo model, layout `single`, fp32, {where}, steps of {STEP} tokens. "
        "Trained on documents of up to 4,096 tokens.",
        "",
        "| context | of it known | first token after s | new tokens/s | s a decoded token "
        "| by the line | entries held, MB | needed, MB | fact repeated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in readings:
        line = first.decode_s + slope * (reads[r.tokens] - reads[first.tokens])
        lines.append(
            f"| {r.tokens:,} | {r.cached:,} | {r.prefill_s:.1f} "
            f"| {(r.tokens - r.cached) / r.prefill_s:,.0f} | {r.decode_s:.4f} | {line:.4f} "
            f"| {r.held / 1e6:.2f} | {r.needed / 1e6:.2f} ({r.held / r.needed - 1:+.2%}) "
            f"| {'yes' if r.answer.strip() == text.fact.answer else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.open(MODEL)
    assert tokenizer is not None
    lengths = [n for n in (1024, 4096, 16384, 65536, 262144, 1048576) if n < args.tokens]
    readings, text = [], Text(tokenizer, args.tokens)
    with torch.inference_mode():
        engine = open_engine(args.tokens, args.device)
        for length in [*lengths, args.tokens]:
            readings.append(run(engine, text, length))
            print(readings[-1], flush=True)
    page = report(readings, text, engine.member.model, args.device, args.threads)
    (args.out / f"long_context-{args.device}-{args.tokens}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
