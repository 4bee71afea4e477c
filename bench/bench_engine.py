"""The engine with the demo model: concurrency against transformers, known prefixes, drafts.

    python bench/bench_engine.py

Everything runs in one process on one thread, fp32, same weights, the ways in turn in one run. Ratios
are of medians. Writes `bench/results/engine.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo.documents.talk import talk
from demo.documents.tools import tool_talk
from machine import heading

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

MODEL = Path("models/demo")
PROMPT, OUTPUT = 64, 64


class Ours:
    """An engine of layout `single`, opened once."""

    def __init__(self, **engine: Any) -> None:
        config = Config.from_dict(
            {
                "model": {"path": str(MODEL)},
                "topology": {"layout": "single"},
                "engine": {"max_batch": 32, **engine},
            }
        )
        self.engine = SingleEngine(config, Source(config.model, Checkpoint.open(MODEL)))
        self.count = 0

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds to the first token of all, and in all."""
        todo = []
        for ids in prompts:
            self.count += 1
            todo.append(Request(f"{self.count}", tuple(ids), tokens, Sampling(0.0), (), True))
        waiting = {r.id for r in todo}
        first, begun = 0.0, time.perf_counter()
        for event in self.engine.run(todo):
            waiting.discard(event.request_id)
            if not waiting and not first:
                first = time.perf_counter() - begun
        return first, time.perf_counter() - begun


def library() -> Callable[[list[list[int]], int], float]:
    """Transformers' `generate` on the same checkpoint: seconds for a batch."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = AutoModelForCausalLM.from_pretrained(
        MODEL,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(
            dequantize=True, scale_fmt="ue8m0", weight_block_size=(128, 128), expert_dtype="fp4"
        ),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = model.float().eval()

    def run(prompts: list[list[int]], tokens: int) -> float:
        begun = time.perf_counter()
        ids = torch.tensor(prompts)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return time.perf_counter() - begun

    return run


def prompts_of(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[list[int]]:
    """Conversations, cut or joined to one length, so that the library needs no padding."""
    found = []
    for i in range(count):
        rng, ids = Random(seed * 1000 + i), [0]
        while len(ids) < length:
            ids += tokenizer.encode_text(talk(rng).turns[0].answer + " ")
        found.append(ids[:length])
    return found


def concurrency(tokenizer: Tokenizer, rounds: int) -> list[str]:
    """Tokens per second at 1, 8 and 32 requests."""
    ours, theirs = Ours(prefix_snapshots=0), library()
    rows = []
    for count in (1, 8, 32):
        times: dict[str, list[float]] = {"ours": [], "library": []}
        for i in range(rounds + 1):
            prompts = prompts_of(tokenizer, count, PROMPT, i)
            took = ours.run(prompts, OUTPUT)[1], theirs(prompts, OUTPUT)
            if i:  # the first round warms both up
                times["ours"].append(took[0])
                times["library"].append(took[1])
        a, b = (count * OUTPUT / statistics.median(times[k]) for k in ("ours", "library"))
        rows.append(f"| {count} | {b:.0f} | {a:.0f} | {a / b:.2f} x |")
    return [
        "| requests | transformers `generate`, tokens/s | engine, tokens/s | ratio |",
        "|---|---|---|---|",
        *rows,
    ]


def prefixes(tokenizer: Tokenizer, rounds: int) -> list[str]:
    """Time to the first token with and without a known prefix of 2,000 tokens."""
    known, unknown = Ours(), Ours(prefix_snapshots=0)
    shared = prompts_of(tokenizer, 1, 2000, 7)[0]
    times: dict[str, list[float]] = {"known": [], "unknown": []}
    for i in range(rounds + 2):
        prompt = [shared + prompts_of(tokenizer, 1, 40, 100 + i)[0]]
        took = known.run(prompt, 1)[0], unknown.run(prompt, 1)[0]
        if i > 1:  # the first fills the tree, the second marks where requests part
            times["known"].append(took[0])
            times["unknown"].append(took[1])
    a, b = (statistics.median(times[k]) * 1e3 for k in ("known", "unknown"))
    return [
        "| first token after 2,000 shared and 40 own tokens | |",
        "|---|---|",
        f"| prefix computed | {b:.0f} ms |",
        f"| prefix known | {a:.0f} ms, {b / a:.1f} x faster |",
    ]


def drafts(tokenizer: Tokenizer, rounds: int) -> list[str]:
    """Tokens per second at one request with 0 to 3 drafts, on generated conversations."""
    import tokenizers

    marked = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = []
    for i in range(rounds * 4):
        dialogue = (tool_talk if i % 4 == 3 else talk)(Random(10**9 + i))
        prompts.append(marked.encode(dialogue.prompt(), add_special_tokens=False).ids)
    engines = {k: Ours(draft_tokens=k) for k in range(4)}
    rates: dict[int, list[float]] = {k: [] for k in engines}
    for prompt in prompts:
        for k, engine in engines.items():
            first, whole = engine.run([prompt], OUTPUT)
            rates[k].append((OUTPUT - 1) / (whole - first))
    rows, base = [], statistics.median(rates[0])
    for k, engine in engines.items():
        counters, rate = engine.engine.loop.counters, statistics.median(rates[k])
        share = f"{counters.accepted / counters.drafted:.0%}" if counters.drafted else ""
        rows.append(f"| {k} | {rate:.0f} | {rate / base:.2f} x | {share} |")
    return [
        "| drafts | tokens/s after the first | ratio | of the drafts accepted |",
        "|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.open(MODEL)
    assert tokenizer is not None
    told = ["# The engine with the demo model", "", heading("python bench/bench_engine.py"), ""]
    told += [f"{PROMPT} tokens of prompt, {OUTPUT} of output, greedy, one thread, fp32.", ""]
    with torch.inference_mode():
        for part in (concurrency, prefixes, drafts):
            rows = part(tokenizer, args.rounds)
            print("\n".join(rows), flush=True)
            told += [*rows, ""]
    args.out.write_text("\n".join(told), encoding="utf-8")


if __name__ == "__main__":
    main()
