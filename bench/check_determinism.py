"""The same tokens and log-probabilities, to the bit, whatever the company and the layout.

    python bench/check_determinism.py

200 prompts of the demo model's kind run at batch 1, 2, 7 and 32 in `single`, `ep` with two members
and `afd` with two attention and three expert members, with prefill cut into chunks of another size
each time, and with drafts and reused prefixes in one more round. Everything is compared to `single`
at batch 1. Writes `bench/results/determinism.md`; exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo.documents.talk import talk
from machine import heading

from whalepod.config import Config
from whalepod.engine.local import open_engine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

MODEL = Path("models/demo")
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"layout": "single"},
    "ep 2": {"layout": "ep", "attention": 2},
    "afd 2+3": {"layout": "afd", "attention": 2, "experts": 3},
}
BATCHES = {1: 512, 2: 67, 7: 130, 32: 301}
# Tokens and log-probabilities by request.
Answers = dict[str, list[tuple[int, float]]]


def requests(count: int, tokens: int) -> list[Request]:
    """Prompts of 3 to 400 tokens; half greedy, half drawn."""
    tokenizer, found = Tokenizer.open(MODEL), []
    assert tokenizer is not None
    for i in range(count):
        rng = Random(i)
        length, ids = rng.randint(3, 400), [0]
        while len(ids) < length:
            ids += tokenizer.encode_text(talk(rng).turns[0].answer + " ")
        sampling = Sampling(0.0) if i % 2 else Sampling(0.8, 0.95, seed=i)
        found.append(Request(str(i), tuple(ids[:length]), tokens, sampling, (), True))
    return found


def answers(layout: dict[str, Any], todo: list[Request], **engine: Any) -> tuple[Answers, float]:
    """Run all requests through a fresh engine; also the seconds it took."""
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": layout,
            "engine": {"max_queue": 10000, "prefix_snapshots": 0, **engine},
        }
    )
    engine_ = open_engine(config, Source(config.model, Checkpoint.open(MODEL)))
    found: Answers = {r.id: [] for r in todo}
    begun = time.perf_counter()
    try:
        for event in engine_.run(todo):
            found[event.request_id].append((event.token, event.logprob))
    finally:
        engine_.close()
    return found, time.perf_counter() - begun


def differences(truth: Answers, found: Answers) -> tuple[int, int]:
    """Requests with another token, and tokens with another log-probability."""
    tokens = sum([t for t, _ in truth[i]] != [t for t, _ in found[i]] for i in truth)
    values = sum(a != b for i in truth for a, b in zip(truth[i], found[i], strict=False))
    return tokens, values


def main() -> None:
    """Run every combination and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    todo = requests(args.prompts, args.tokens)
    truth, wrong = None, 0
    lines = [
        "# The same bits in any company",
        "",
        heading("python bench/check_determinism.py"),
        "",
        f"{len(todo)} prompts of 3 to 400 tokens, {args.tokens} new tokens each, half of them greedy.",
        "",
        "| layout | batch | tokens of a step | requests with other tokens "
        "| other log-probabilities | s |",
        "|---|---|---|---|---|---|",
    ]
    cases = [(n, b, {"max_step_tokens": BATCHES[b]}) for n in LAYOUTS for b in BATCHES]
    extra = {"draft_tokens": 2, "prefix_snapshots": 32, "max_step_tokens": 90}
    cases += [(f"{n}, drafts, prefixes", 8, extra) for n in LAYOUTS]
    with torch.inference_mode():
        for name, batch, engine in cases:
            layout = LAYOUTS[name.split(",")[0]]
            found, took = answers(layout, todo, max_batch=batch, **engine)
            truth = truth or found
            tokens, values = differences(truth, found)
            wrong += tokens + values
            step = engine["max_step_tokens"]
            lines.append(f"| {name} | {batch} | {step} | {tokens} | {values} | {took:.0f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    Path("bench/results/determinism.md").write_text(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
