"""Time the products on one GPU: routed experts in FP4, FP8 matrices, the output head, the gate.

PYTHONPATH=src:. python bench/kernels_gemm.py [--warm] [--only experts,linear,gate] [--model flash]

`--warm` runs every line once with few experts, to compile: several at a time do not disturb a clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import gpu
from bench.machine import heading
from torch import Tensor

from whalepod.kernels.act_quant import act_quant
from whalepod.kernels.combine import combine
from whalepod.kernels.dense import dense
from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.fp4_experts import fp4_experts
from whalepod.kernels.fp8_linear import Fp8Matrix, fp8_linear
from whalepod.kernels.gate import gate

BF16 = torch.bfloat16
TOKENS = (1, 16, 64, 128, 512, 4096)
LIMIT, CHOSEN, VOCABULARY = 10.0, 6, 129_280
# Bytes of inputs that a graph goes through, so that none is left in the cache from the last call.
SPAN = 160 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """A model's widths: hidden, intermediate, low rank of queries, heads, groups of the output."""

    name: str
    hidden: int
    inner: int
    experts: int
    rank: int
    heads: int
    groups: int


SIZES = (Size("flash", 4096, 2048, 256, 1024, 64, 8), Size("pro", 7168, 3072, 384, 1536, 128, 16))


def normal(*shape: int) -> Tensor:
    """Random bf16."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def sets(nbytes: float) -> int:
    """How many input sets a graph needs."""
    return max(1, min(24, int(SPAN // nbytes) + 1))


def fp4_stack(count: int, rows: int, columns: int) -> Fp4Stack:
    """Random codes; scales between 2^-9 and 2^-6, as a trained model's."""
    blocks = columns // 128
    codes = torch.empty(count, blocks, rows, 32, dtype=torch.int16, device="cuda")
    codes.random_(-32768, 32767)
    scales = torch.randint(244, 248, (count, blocks, rows, 4), dtype=torch.uint8, device="cuda")
    gain = torch.ones(count, device="cuda")
    return Fp4Stack(codes, scales.view(torch.int32).squeeze(-1), gain, columns)


def fp8_matrix(rows: int, columns: int, groups: int = 1) -> Fp8Matrix:
    """Random values with one scale."""
    made = torch.randn(groups, columns // 128, rows, 128, device="cuda")
    codes = made.to(torch.float8_e4m3fn).view(torch.int16)
    scales = torch.full((groups, columns // 128, -(-rows // 128)), 2.0**-6, device="cuda")
    return Fp8Matrix(codes, scales, columns)


def choices(tokens: int, experts: int) -> Tensor:
    """Different experts for every token, uniformly."""
    return torch.rand(tokens, experts, device="cuda").topk(CHOSEN).indices


def grouped(x: Tensor, experts: Tensor, w13: Tensor, w2: Tensor) -> Callable[[], object]:
    """The same products over bf16 weights by torch's grouped product, rows already sorted."""
    order = experts.flatten().argsort()
    ends = torch.bincount(experts.flatten(), minlength=len(w13)).cumsum(0).int()
    rows = x[order // CHOSEN]

    def run() -> Tensor:
        up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends)
        a, b = up.chunk(2, -1)
        return torch._grouped_mm(F.silu(a) * b, w2.transpose(1, 2), offs=ends)

    return run


def expert_rows(size: Size, released: bool, warm: bool) -> Iterator[gpu.Row]:
    """Routing, both launches and everything between, over all experts of a layer."""
    held = 16 if warm else size.experts
    w13 = fp4_stack(held, 2 * size.inner, size.hidden)
    w2 = fp4_stack(held, size.hidden, size.inner)
    wide = None
    if size.name == "flash" and not (warm or released):
        shapes = (held, 2 * size.inner, size.hidden), (held, size.hidden, size.inner)
        wide = tuple(normal(*shape) for shape in shapes)
    slots = torch.arange(size.experts, device="cuda", dtype=torch.int32)
    slots[held:] = -1
    each = (w13.nbytes + w2.nbytes) / held
    for tokens in TOKENS:
        inputs = []
        for _ in range(8 if tokens == 1 else 1):
            weights = torch.rand(tokens, CHOSEN, device="cuda")
            inputs.append((normal(tokens, size.hidden), choices(tokens, size.experts), weights))
        seconds = gpu.timed(
            [lambda a=a: fp4_experts(*a, slots, w13, w2, LIMIT, released) for a in inputs], 10
        )
        touched = sum(len(a[1].unique()) for a in inputs) / len(inputs)
        peers: list[tuple[str, float]] = []
        if wide is not None:
            calls = [grouped(a[0], a[1], *wide) for a in inputs]
            peers.append(("grouped_mm bf16", gpu.timed(calls, 5)))
        yield gpu.Row(
            "fp4_experts" + (" released" if released else ""),
            f"{size.name} M={tokens}",
            seconds,
            touched * each + tokens * size.hidden * 2 * (1 + CHOSEN),
            6 * tokens * CHOSEN * size.hidden * size.inner,
            tuple(peers),
        )


def linear_rows(size: Size, released: bool) -> Iterator[gpu.Row]:
    """The attention's projections and the shared expert's first one."""
    grouped_in = size.heads * 512 // size.groups
    shapes = {
        "wq_a + wkv": (size.rank + 512, size.hidden, 1),
        "wq_b": (size.heads * 512, size.rank, 1),
        "wo_a": (1024, grouped_in, size.groups),
        "wo_b": (size.hidden, 1024 * size.groups, 1),
        "shared": (2 * size.inner, size.hidden, 1),
    }
    for name, (rows, columns, groups) in shapes.items():
        bytes_of = rows * columns * groups
        some = [fp8_matrix(rows, columns, groups) for _ in range(sets(bytes_of))]
        wide = [normal(groups, columns, rows) for _ in some]
        for tokens in TOKENS:
            x = normal(tokens, groups * columns)
            split = x.view(tokens, groups, columns).transpose(0, 1)
            seconds = gpu.timed([lambda m=m, x=x: fp8_linear(x, m, released) for m in some], 10)
            peer = gpu.timed([lambda w=w, s=split: torch.bmm(s, w) for w in wide], 5)
            moved = bytes_of + 2 * tokens * groups * (rows + columns)
            yield gpu.Row(
                "fp8_linear" + (" released" if released else ""),
                f"{size.name} {name} M={tokens}",
                seconds,
                moved,
                2 * tokens * rows * columns * groups,
                (("torch bf16", peer),),
            )


def gate_rows(size: Size) -> Iterator[gpu.Row]:
    """What stands between attention and experts, and the output head."""
    for tokens in TOKENS:
        label = f"{size.name} M={tokens}"
        inputs = [
            (normal(tokens, size.hidden), normal(size.experts, size.hidden), CHOSEN, 2.5,
             torch.randn(size.experts, device="cuda"))
            for _ in range(24 if tokens <= 512 else 2)
        ]  # fmt: skip
        moved = 2 * size.hidden * (size.experts + tokens)
        eager = gpu.timed([lambda a=a: gate.reference(*a) for a in inputs[:2]], 5)
        seconds = gpu.timed([lambda a=a: gate(*a) for a in inputs])
        yield gpu.Row("gate", label, seconds, moved, 0, (("eager", eager),))
        x = [normal(tokens, size.hidden) for _ in range(sets(3 * tokens * size.hidden))]
        seconds = gpu.timed([lambda a=a: act_quant(a, True) for a in x])
        eager = gpu.timed([lambda a=a: act_quant.reference(a, True) for a in x[:2]], 5)
        yield gpu.Row("act_quant", label, seconds, 3 * x[0].numel(), 0, (("eager", eager),))
        parts = [normal(tokens, CHOSEN, size.hidden) for _ in range(sets(16 * x[0].numel()))]
        seconds = gpu.timed([lambda a=a: combine(a) for a in parts])
        eager = gpu.timed([lambda a=a: combine.reference(a) for a in parts[:2]], 5)
        yield gpu.Row("combine", label, seconds, 16 * x[0].numel(), 0, (("eager", eager),))
    head = normal(VOCABULARY, size.hidden)
    for tokens in TOKENS[:5]:
        x = normal(tokens, size.hidden)
        sizes = (VOCABULARY, size.hidden, torch.float32)
        seconds = gpu.timed([lambda x=x, s=sizes: dense(x, None, head, None, "bf16", *s)], 10)
        peer = gpu.timed([lambda x=x: torch.mm(x, head.t())], 5)
        flops = 2 * tokens * head.numel()
        label = f"{size.name} M={tokens}"
        yield gpu.Row("head", label, seconds, 2 * head.numel(), flops, (("torch bf16", peer),))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--only", default="experts,experts-released,linear,linear-released,gate")
    parser.add_argument("--model", choices=["flash", "pro"])
    args = parser.parse_args()
    torch.manual_seed(0)
    makers: dict[str, Callable[[Size], Iterator[gpu.Row]]] = {
        "experts": lambda size: expert_rows(size, False, args.warm),
        "experts-released": lambda size: expert_rows(size, True, args.warm),
        "linear": lambda size: linear_rows(size, False),
        "linear-released": lambda size: linear_rows(size, True),
        "gate": gate_rows,
    }
    sizes = [s for s in SIZES if args.model in (None, s.name)]
    copy, matrix = (1.0, 1.0) if args.warm else (gpu.copy_rate(), gpu.matrix_rate())
    rows: list[gpu.Row] = []
    for name in args.only.split(","):
        for size in sizes:
            rows += makers[name](size)
            torch.cuda.empty_cache()
    if not args.warm:
        print(heading(" ".join(["python", *sys.argv])))
        print(f"\nCopy {copy / 1e9:.0f} GB/s, product {matrix / 1e12:.0f} TFLOP/s.\n")
        print(gpu.table(rows, copy, matrix))


if __name__ == "__main__":
    main()
