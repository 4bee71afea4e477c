"""What it costs that a row's bits never depend on its company: whole runs of the engine, A against B.

    python bench/invariance.py

A is the engine as it is: every product sums in one order, whatever the number of rows. B takes torch's
BLAS for dense products, as fast as it likes, and so gives bits that depend on the batch. They take
turns in one process on one thread with the demo model in fp32; ratios are of medians. Writes
`bench/results/invariance.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_engine import Ours
from machine import heading
from torch import Tensor

from whalepod.kernels.linear import grouped_linear, linear

TURNS = 7


def free_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Torch's own product."""
    return F.linear(x_MK, weight_NK)


def free_grouped_linear(x_MGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """Torch's own batched product."""
    return torch.einsum("mgk,gnk->mgn", x_MGK, weight_GNK).flatten(1)


def use(one: Callable[..., Tensor] | None, grouped: Callable[..., Tensor] | None) -> None:
    """Run products with these, or with the kernels that the registry picks."""
    for kernel, function in ((linear, one), (grouped_linear, grouped)):
        kernel.forget()
        if function is not None:
            kernel._picked["cpu"] = function


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    ways: dict[str, tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]] = {
        "one order": (None, None),
        "BLAS": (free_linear, free_grouped_linear),
    }
    lines = [
        "# The cost of batch invariance on a CPU",
        "",
        heading("python bench/invariance.py"),
        "",
        "Seconds of whole runs of the engine; below 1 the engine as it is is the faster one.",
        "",
        "| run | as it is s | products by BLAS s | as it is / BLAS |",
        "|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(1)
    runs = [("decode", b, 64, 64) for b in (1, 8, 32)] + [("prompt", 1, 2000, 1)]
    with torch.inference_mode():
        engine = Ours(prefix_snapshots=0)
        for kind, batch, prompt, tokens in runs:
            took: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(TURNS + 1):
                ids = torch.randint(3, 4000, (batch, prompt), generator=generator).tolist()
                for name, functions in ways.items():
                    use(*functions)
                    first, whole = engine.run(ids, tokens)
                    if turn:
                        took[name].append(first if kind == "prompt" else whole - first)
            a, b = (statistics.median(times) for times in took.values())
            lines.append(
                f"| {kind}, {batch} x {prompt} + {tokens} | {a:.3f} | {b:.3f} | {a / b:.2f} |"
            )
            print(lines[-1], flush=True)
    Path("bench/results/invariance.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
