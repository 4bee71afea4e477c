"""Time decode steps and prefill of a slice of V4-Flash on one GPU, beside what must be read.

    PYTHONPATH=src:. python bench/gpu_step.py [--layers 8] [--batch 1 16 64 256]
        [--context 1024 16384] [--prefill 8192] [--fidelity plain released]
        [--gates balanced random] [--kernels]

Weights are random, in the released format, with all experts, the embedding and the head. Gates are
balanced by their biases, as training leaves them, or as random weights make them. Contexts are
not prefilled: rings and pools hold random values, which costs a step the same.

"graph" is the device's part of a step alone; "step" all that a member does for one, which it launches while
the last is under way; "one by one" the same if it did not. The floor is the bytes of a step over the rate of a
device copy: every weight outside the experts, the experts that the step's tokens chose, the keys that are
scored and attended to, the head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import gpu
from bench.decode_loop import step_seconds
from bench.machine import heading
from bench.random_weights import RandomCheckpoint
from torch import Tensor

from whalepod.config import Model
from whalepod.engine.attention import AttentionStage
from whalepod.engine.experts import LocalExperts
from whalepod.engine.graph import DecodeGraphs
from whalepod.engine.request import Sampling
from whalepod.engine.source import Source
from whalepod.engine.step import MicroBatch, Part
from whalepod.kernels import overlap
from whalepod.model.batch import Batch, Span
from whalepod.model.gate import Gate, Routes
from whalepod.model.shape import ModelConfig

RATIOS = (0, 0, 4, 128, 4, 128, 4, 128)


class CountingGate(Gate):
    """A gate that notes how many experts its last pass chose, and balances itself when told to."""

    distinct = 0
    balancing = False

    def route(self, x_TD: Tensor, token_ids_T: Tensor) -> Routes:
        """As `Gate.route`."""
        if self.balancing and self.bias_E is not None:
            # So that as many of these tokens prefer each expert.
            scores_TE = F.softplus(x_TD.float() @ self.weight_ED.float().t()).sqrt()
            share = 1 - self.config.num_experts_per_tok / self.config.n_routed_experts
            self.bias_E.copy_(-scores_TE.quantile(share, dim=0))
        routes = super().route(x_TD, token_ids_T)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            self.distinct = len(routes.experts_TK.unique())
        return routes


@dataclass(slots=True)
class Slice:
    """A stage with its experts."""

    config: ModelConfig
    stage: AttentionStage
    experts: LocalExperts
    gates: dict[int, CountingGate]
    expert_bytes: float
    weight_bytes: float

    @classmethod
    def of(cls, config: ModelConfig, fidelity: str, device: str, blocks: int) -> Slice:
        """Draw the weights."""
        model = Model(path="random", dtype="bf16", fidelity=fidelity)  # type: ignore[arg-type]
        source = Source(model, RandomCheckpoint(config, device), device, packed=True)  # type: ignore[arg-type]
        before = allocated(device)
        stage = source.stage(config.layers, slots=256, blocks=blocks)
        gates = {layer: source.gate(layer) for layer in config.layers}
        for gate in gates.values():
            gate.__class__ = CountingGate
        weights = allocated(device) - before - stage.cache.nbytes
        assert stage.embedding is not None
        tables = {layer: source.experts(layer) for layer in config.layers}
        held = sum(t.nbytes for t in tables.values())  # type: ignore[union-attr]
        each = held / len(tables) / config.n_routed_experts
        fill_cache(stage)
        found = {layer: gate for layer, gate in gates.items() if isinstance(gate, CountingGate)}
        embedding = stage.embedding.nbytes
        return cls(config, stage, LocalExperts(gates, tables), found, each, weights - embedding)

    def step(self, batch: int, context: int, seed: int) -> MicroBatch:
        """A token for each of the same `batch` sequences that have `context` behind them."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.config.vocab_size, (batch,), generator=generator).tolist()
        per = -(-(context + 1) // self.stage.cache.block_tokens)
        tables = tables_of(self.stage.cache.blocks, batch, per)
        draw = (Sampling(0.0), context + 1)
        parts = zip(ids, tables, strict=True)
        return MicroBatch(
            tuple(Part(i, context, (token,), table, draw) for i, (token, table) in enumerate(parts))
        )

    def floor_bytes(self, batch: int, context: int) -> float:
        """What a step of these sizes must read, with the experts of the last pass that was counted."""
        config, keys = self.config, 0.0
        for layer in config.layers:
            ratio = config.ratio(layer)
            attended = config.sliding_window
            if ratio:
                attended += min(context // ratio, config.index_topk if ratio == 4 else 1 << 40)
            scored = context // 4 * config.index_head_dim if ratio == 4 else 0
            keys += batch * 2 * (attended * config.head_dim + scored)
        experts = sum(gate.distinct for gate in self.gates.values()) * self.expert_bytes
        return self.weight_bytes + experts + keys


@cache
def tables_of(blocks: int, batch: int, per: int) -> tuple[tuple[int, ...], ...]:
    """Blocks of each of `batch` sequences, scattered over the pool; as in serving, they rarely change."""
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(tuple(order[i * per : i * per + per]) for i in range(batch))


def balance(found: Slice, tokens: int = 256) -> None:
    """Set the gates' biases as training does: so that tokens spread evenly over the experts.

    Random weights leave the streams of all tokens alike, and gates would send most to the same few.
    """
    for gate in found.gates.values():
        gate.balancing = True
    DecodeGraphs(found.stage, capture=False).run([found.step(tokens, 127, 99)], found.experts)
    for gate in found.gates.values():
        gate.balancing = False


def fill_cache(stage: AttentionStage) -> None:
    """Draw what contexts would have left in rings and pools."""
    for layer in stage.cache.layers.values():
        for rings in (layer.window, *(p.raw for p in (layer.main, layer.index) if p)):
            rings.normal_()
        for part in (layer.main, layer.index):
            if part is not None:
                part.stored.normal_()


def allocated(device: str) -> int:
    """Bytes of tensors on the device."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def decode_line(found: Slice, batch: int, context: int, copy: float, capture: bool) -> str:
    """Time graphs alone, and steps as a member runs them, ahead of their tokens and one by one."""
    graphs = DecodeGraphs(found.stage, capture=capture)
    steps = [found.step(batch, context, seed) for seed in range(4)]
    graphs.run([steps[-1]], found.experts)
    floor = found.floor_bytes(batch, context) / copy
    device: list[float] = []
    for i in range(24 if capture else 0):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graphs.run([steps[i % len(steps)]], found.experts)
        after.record()
        after.synchronize()
        device.append(before.elapsed_time(after) / 1e3)
    distinct = sum(g.distinct for g in found.gates.values()) / max(1, len(found.gates))
    took = statistics.median(device[4:]) if capture else float("nan")
    total, apart = step_seconds(found.stage, graphs, found.experts, batch, context)
    return (
        f"| {batch} | {context:,} | {took * 1e3:.3f} | {total * 1e3:.3f} | {apart * 1e3:.3f} | {distinct:.0f} | "
        f"{floor * copy / 1e9:.2f} | {floor * 1e3:.3f} | {took / floor:.2f} | {total / floor:.2f} | "
        f"{batch / total:,.0f} |"
    )


def kernel_lines(run: Callable[[], object], calls: int = 8) -> str:
    """The kernels that a pass spends most of its time in: launches and microseconds of one pass.

    They run one after the other here, or each would be charged with its wait for the one before.
    """
    overlap.overlapping = False
    try:
        for _ in range(3):
            run()
        return gpu.profile(run, calls)
    finally:
        overlap.overlapping = True


def decode_kernels(found: Slice, batch: int, context: int) -> str:
    """Those of a decode step."""
    graphs, step = DecodeGraphs(found.stage), found.step(batch, context, 0)
    return f"\nBatch {batch}, context {context:,}:\n" + kernel_lines(
        lambda: graphs.run([step], found.experts)
    )


def prefill(found: Slice, tokens: int, seed: int) -> None:
    """Take a prompt of one sequence in."""
    stage = found.stage
    blocks = tuple(range(-(-tokens // stage.cache.block_tokens)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, found.config.vocab_size, (tokens,), generator=generator).tolist()
    spans = [Span(0, 0, 0, tokens, blocks)]
    batch = Batch.of(ids, spans, stage.cache.block_tokens, stage.device)
    x = stage.forward([batch], [stage.embed(batch)], found.experts)
    stage.logits(x[0], [tokens - 1]).argmax().item()
    batch.commit()


def prefill_line(found: Slice, tokens: int) -> str:
    """Time a prompt of one sequence in one pass."""
    times = []
    for seed in range(4):
        start = time.perf_counter()
        prefill(found, tokens, seed)
        times.append(time.perf_counter() - start)
    took = statistics.median(times[1:])
    return f"Prefill of {tokens:,} tokens in one pass: {took * 1e3:.1f} ms, {tokens / took:,.0f} tokens/s."


def print_tables(found: Slice, args: argparse.Namespace, copy: float) -> None:
    """Steps and a prompt; with `--kernels` what the device does meanwhile."""
    print(
        "| batch | context | graph ms | step ms | one by one | experts a layer | GB | floor ms | "
        "graph / floor | step / floor | tokens/s |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for context in args.context:
        for batch in args.batch:
            print(decode_line(found, batch, context, copy, args.device == "cuda"), flush=True)
    print("\n" + prefill_line(found, args.prefill), flush=True)
    for batch in args.batch if args.kernels else ():
        print(decode_kernels(found, batch, args.context[0]), flush=True)
    if args.kernels:
        print(kernel_lines(partial(prefill, found, args.prefill, 0)), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="configs/models/deepseek-v4-flash.json")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--fidelity", nargs="+", default=["plain", "released"])
    parser.add_argument("--gates", nargs="+", default=["balanced"], choices=["balanced", "random"])
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    cuda = args.device == "cuda"
    copy = gpu.copy_rate() if cuda else 1e10
    known = ModelConfig.from_file(Path(args.model)).model_dump()
    changes = {"num_hidden_layers": args.layers, "num_nextn_predict_layers": 0}
    ratios = [*RATIOS[: args.layers]]
    config = ModelConfig.from_dict({**known, **changes, "compress_ratios": ratios})
    print(heading(" ".join(["python", *sys.argv])))
    print(f"\nCopy {copy / 1e9:.0f} GB/s. Layers {ratios}, {config.n_routed_experts} experts each.")
    most = max(args.batch) * max(-(-(c + 1) // 128) for c in args.context)
    for fidelity in args.fidelity:
        with torch.inference_mode():
            start = time.perf_counter()
            found = Slice.of(config, fidelity, args.device, max(most, 256, args.prefill // 128 + 1))
            if cuda:
                torch.cuda.synchronize()
            print(f"\n(weights drawn in {time.perf_counter() - start:.1f} s)")
            for gates in sorted(args.gates, reverse=True):  # random ones first
                if gates == "balanced":
                    balance(found)
                print(f"\n`fidelity: {fidelity}`, {gates} gates\n")
                print_tables(found, args, copy)
            del found
            if cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
