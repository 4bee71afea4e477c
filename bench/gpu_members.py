"""Time V4-Pro's two kinds of members alone on one GPU, beside what they must read.

    PYTHONPATH=src:. python bench/gpu_members.py [--model configs/models/deepseek-v4-pro.json]
        [--part shard stage] [--of 16] [--layers 61]

An expert shard holds one part in `--of` of every layer's experts, or as many as fit, and serves the rows
that so many tokens in flight, each choosing uniformly among all experts, send to it; legs are not in the figures.
An attention member holds the attention side of every layer; its experts answer at once with rows that
were there before. Weights are random, in the released format, and stay packed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from bench import gpu
from bench.gpu_step import Slice, allocated, decode_line, fill_cache, prefill_line
from bench.machine import heading
from bench.random_weights import RandomCheckpoint
from torch import Tensor

from whalepod.config import Model
from whalepod.engine.expert import fill
from whalepod.engine.source import Source
from whalepod.model.shape import ModelConfig
from whalepod.model.stack import ExpertStack

BF16 = torch.bfloat16


class Answers:
    """Experts of other members, in no time: for each pass the rows that were there before."""

    places: tuple[int, ...] = ()
    key: tuple[int, ...] = ()

    def __init__(self, width: int, most: int, device: str) -> None:
        self._rows = torch.randn(most, width, device=device)
        self._counts: dict[tuple[int, int], int] = {}

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Note how many rows leave."""
        self._counts[layer, micro_batch] = len(x_TD)

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """As many rows."""
        return self._rows[: self._counts.pop((layer, micro_batch))]

    def settle(self) -> None:
        """Nothing is under way."""


def arrivals(config: ModelConfig, tokens: int, own: int) -> Tensor:
    """Expert ids of the (token, expert) pairs that reach a shard with experts 0 to `own` - 1."""
    drawn = torch.rand(tokens, config.n_routed_experts).topk(config.num_experts_per_tok).indices
    return drawn[drawn < own]


def shard_lines(source: Source, own: int, layers: int, tokens: list[int], copy: float) -> list[str]:
    """Time a pass of all layers; weights are far larger than the cache, so each is read anew."""
    config, device = source.config, source.device
    tables = []
    for layer in range(layers):
        table = source.table()
        fill(table, [*range(own)], lambda e, layer=layer: source.expert(layer, e))  # type: ignore[misc]
        assert isinstance(table, ExpertStack)
        tables.append(table)
    held = sum(table.nbytes for table in tables)
    each = held / layers / own
    lines = [
        f"{own} of {config.n_routed_experts} experts of {layers} layers, {held / 1e9:.1f} GB.\n",
        "| tokens in flight | rows a layer | experts touched | us a layer | floor us "
        "| time / floor | rows/s of one layer |\n|---|---|---|---|---|---|---|",
    ]
    for count in tokens:
        pairs = [arrivals(config, count, own) for _ in tables]
        rows = max(1, round(sum(map(len, pairs)) / layers))
        # Graphs need one size: the mean, drawn with the loads of the experts that chance gives.
        chosen = [torch.cat([p, p, torch.randint(own, (rows,))])[:rows] for p in pairs]
        touched = sum(len(c.unique()) for c in chosen) / layers
        x = torch.randn(rows, config.hidden_size, device=device, dtype=BF16)
        weights = torch.rand(rows, 1, device=device)
        places = [c.unsqueeze(1).to(device) for c in chosen]

        def run(places: list[Tensor] = places, x: Tensor = x, weights: Tensor = weights) -> None:
            for table, at in zip(tables, places, strict=True):
                table(x, at, weights)

        took = gpu.timed([run]) / layers
        floor = (touched * each + rows * config.hidden_size * 4) / copy
        lines.append(
            f"| {count:,} | {rows:,} | {touched:.0f} | {took * 1e6:.1f} | {floor * 1e6:.1f} | "
            f"{took / floor:.2f} | {rows / took:,.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def shards_that_fit(config: ModelConfig, layers: int) -> int:
    """Of how few shards one fits this GPU, with room for what else a pass needs."""
    each = layers * 3 * config.hidden_size * config.moe_intermediate_size * (1 / 2 + 1 / 32)
    room, experts = torch.cuda.mem_get_info()[0] * 0.85, config.n_routed_experts
    for of in range(1, experts + 1):
        if experts % of == 0 and experts // of * each <= room:
            return of
    raise SystemExit(f"one expert of {layers} layers takes {each:.2e} bytes: pass fewer --layers")


def stage_lines(
    source: Source, sizes: list[tuple[int, int]], prefill: int, copy: float
) -> list[str]:
    """Time decode steps and a prompt on the attention side of all layers."""
    config, device = source.config, str(source.device)
    cuda = device == "cuda"
    blocks = max(batch * -(-(context + 1) // 128) for batch, context in sizes)
    before = allocated(device)
    stage = source.stage(config.layers, slots=256, blocks=max(blocks, prefill // 128 + 1))
    assert stage.embedding is not None
    weights = allocated(device) - before - stage.cache.nbytes - stage.embedding.nbytes
    fill_cache(stage)
    most = max(prefill, *(batch for batch, _ in sizes))
    answers = Answers(config.hidden_size, most, device)
    found = Slice(config, stage, answers, {}, 0.0, weights)  # type: ignore[arg-type]
    layers = len(stage.layers)
    lines = [
        f"{layers} layers and the head: {weights / 1e9:.1f} GB of weights.\n",
        "| batch | context | graph ms | step ms | one by one | experts | GB | floor ms "
        "| graph / floor | step / floor | tokens/s |\n|" + 11 * "---|",
    ]
    for batch, context in sizes:
        lines.append(decode_line(found, batch, context, copy, cuda))
        print(lines[-1], file=sys.stderr, flush=True)
    return [*lines, "", prefill_line(found, prefill)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("configs/models/deepseek-v4-pro.json"))
    parser.add_argument("--part", nargs="+", default=["shard", "stage"])
    parser.add_argument("--of", type=int, help="shards; as few as fit the GPU if not given")
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 128, 512, 1024, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--fidelity", default="plain")
    args = parser.parse_args()
    torch.manual_seed(0)
    known = ModelConfig.from_file(args.model)
    config = ModelConfig.from_dict(
        {
            **known.model_dump(),
            "num_hidden_layers": args.layers,
            "num_nextn_predict_layers": 0,
            "compress_ratios": list(known.compress_ratios[: args.layers]),
        }
    )
    model = Model(path="random", dtype="bf16", fidelity=args.fidelity)
    copy = gpu.copy_rate()
    print(heading(" ".join(["python", *sys.argv])))
    print(f"\nCopy {copy / 1e9:.0f} GB/s. `fidelity: {args.fidelity}`, BF16.")
    with torch.inference_mode():
        source = Source(model, RandomCheckpoint(config, "cuda"), "cuda", packed=True)
        if "shard" in args.part:
            of = args.of or shards_that_fit(config, args.layers)
            own = config.n_routed_experts // of
            print(f"\n## An expert shard, one of {of}\n")
            print("\n".join(shard_lines(source, own, args.layers, args.tokens, copy)))
            gc.collect()
            torch.cuda.empty_cache()
        if "stage" in args.part:
            sizes = [(batch, context) for context in args.context for batch in args.batch]
            print("\n## An attention member\n")
            print("\n".join(stage_lines(source, sizes, args.prefill, copy)))


if __name__ == "__main__":
    main()
