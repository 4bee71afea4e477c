"""Time one decode step: transformers, and every layout of this process, in one run.

    python bench/bench_step.py [--model DIR] [--batch 1 8] [--steps 100] [--out FILE.md]

Prompts of equal length are prefilled first; then every step gives each sequence one token. One
CPU thread per member. Timings are medians with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from machine import describe, heading, quantiles

from whalepod.config import Config
from whalepod.engine.local import SingleEngine, ThreadedEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tiny import make_tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"layout": "single"},
    "afd threads 1+1+2": {"layout": "afd", "experts": 2},
    "afd threads 1+2, router seated": {"layout": "afd", "experts": 2, "router": "attention"},
    "ep threads 2": {"layout": "ep", "attention": 2},
}
PROMPT = 256


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Random ids of equal length."""
    generator = torch.Generator().manual_seed(batch)
    made: list[list[int]] = torch.randint(
        3, vocabulary - 20, (batch, PROMPT), generator=generator
    ).tolist()
    return made


def time_transformers(folder: Path, batch: int, steps: int, vocabulary: int) -> list[float]:
    """Batched greedy decoding with transformers' own cache, eager, fp32."""
    from transformers import DeepseekV4ForCausalLM, DynamicCache, FineGrainedFP8Config

    rounding = FineGrainedFP8Config(dequantize=True, scale_fmt="ue8m0", expert_dtype="fp4")
    model = DeepseekV4ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=rounding,
        attn_implementation="eager",
        experts_implementation="eager",
    ).float()
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(prompts(batch, vocabulary))
    times = []
    with torch.inference_mode():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(steps):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
    return times


def time_layout(source: Source, topology: dict[str, Any], batch: int, steps: int) -> list[float]:
    """Steps of one layout, from token to token of a sequence."""
    config = Config.from_dict(
        {
            "model": {"path": str(source.checkpoint.path)},
            "topology": topology,
            "engine": {"max_step_tokens": 4096, "max_batch": 32},
        }
    )
    requests = [
        Request(str(i), tuple(ids), steps + 1, Sampling(0.0), ignore_eos=True)
        for i, ids in enumerate(prompts(batch, source.config.vocab_size))
    ]
    single = topology["layout"] == "single"
    stamps: list[float] = []
    with torch.inference_mode():
        engine = SingleEngine(config, source) if single else ThreadedEngine(config, source)
        try:
            for event in engine.run(requests):
                if event.request_id == "0":
                    stamps.append(time.perf_counter())
        finally:
            engine.close()
    return [b - a for a, b in pairwise(stamps)]


def main() -> None:
    """Measure, print a table and JSON lines, and write them when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or make_tiny(Path(tempfile.mkdtemp()) / "tiny")
    source = Source(
        Config.from_dict({"model": {"path": str(folder)}}).model, Checkpoint.open(folder)
    )
    lines = ["| what | batch | ms a step (p10-p90) | against transformers | legs | ms a leg |"]
    lines.append("|---|---|---|---|---|---|")
    for batch in options.batch:
        measured = measure(folder, source, batch, options.steps)
        lines += rows(measured, batch, source.config.num_hidden_layers)
    command = f"python bench/bench_step.py --steps {options.steps}"
    text = "\n".join([heading(command), "", *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(f"# Decode step of the small model\n\n{text}")


def measure(folder: Path, source: Source, batch: int, steps: int) -> dict[str, list[float]]:
    """Times by name, warm-up cut off."""
    vocabulary, warm = source.config.vocab_size, min(10, steps // 4)
    jobs: dict[str, Callable[[], list[float]]] = {
        "transformers": lambda: time_transformers(folder, batch, steps, vocabulary)
    }
    for name, topology in LAYOUTS.items():
        jobs[name] = lambda t=topology: time_layout(source, t, batch, steps)
    found = {}
    for name, job in jobs.items():
        found[name] = job()[warm:]
        p10, median, p90 = quantiles(found[name])
        told = {"what": name, "batch": batch, "ms": median, "p10": p10, "p90": p90}
        print(json.dumps({**told, **describe()}), file=sys.stderr, flush=True)
    return found


def rows(measured: dict[str, list[float]], batch: int, layers: int) -> list[str]:
    """Table rows; a leg's cost is what it adds to `single`."""
    theirs = quantiles(measured["transformers"])[1]
    alone = quantiles(measured["single"])[1]
    out = []
    for name, times in measured.items():
        p10, median, p90 = quantiles(times)
        per_layer = 3 if "1+1" in name else 0 if name in ("single", "transformers") else 2
        legs = per_layer * layers
        leg = f"{(median - alone) / legs:.3f}" if legs else "-"
        out.append(
            f"| {name} | {batch} | {median:.2f} ({p10:.2f}-{p90:.2f}) | "
            f"{theirs / median:.2f} x | {legs or '-'} | {leg} |"
        )
    return out


if __name__ == "__main__":
    main()
