"""Train the demo model for a given time; every run continues where the last one stopped.

    python -m demo.train --folder .cache/demo --seconds 540 --length 512 --rows 128
    python -m demo.train --folder .cache/demo --seconds 540 --length 4096 --rows 16 --final

Reads what `demo.texts` and `demo.tokens` wrote. Keeps `state.pt` (everything, for the next run)
and `weights/part-*.pt` (parameters in bf16, small files) in `--out`. Losses: next token, MTP, and
the indexer's KL to what its layer's heads attend to.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from demo.batches import Recipe, Source, stream
from demo.model import demo_config, hash_table
from demo.net.basic import Params
from demo.net.parameters import counts, start, trained
from demo.net.whole import Losses, Net
from demo.optimiser import Optimiser
from demo.weights import save_parts
from whalepod.model.shape import ModelConfig

MTP_WEIGHT, INDEX_WEIGHT = 0.3, 0.3


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path(".cache/demo"))
    p.add_argument("--out", type=Path, default=Path(".cache/demo/run"))
    p.add_argument("--restart", action="store_true", help="go on with a new optimiser")
    p.add_argument("--seconds", type=float, default=540, help="of training, start-up not counted")
    p.add_argument("--length", type=int, default=512, help="tokens a row, a multiple of 128")
    p.add_argument("--rows", type=int, default=128, help="rows a batch")
    p.add_argument("--shares", type=float, nargs=3, default=(0.25, 0.4, 0.35))
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=100, help="steps, with a new optimiser")
    p.add_argument("--dense", type=float, default=0.0, help="first share of the run without top-k")
    p.add_argument("--bias-speed", type=float, default=0.01)
    p.add_argument("--final", action="store_true", help="let the learning rate fall to nothing")
    p.add_argument(
        "--quantise", type=float, default=1.0, help="share of the run before FP4 experts"
    )
    p.add_argument("--workers", type=int, default=12, help="processes that make batches")
    p.add_argument("--report", type=float, default=30, help="seconds between evaluations")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


class Trainer:
    """State of a run."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.config = ModelConfig.from_dict(demo_config())
        self.saved = args.out / "state.pt"
        state = torch.load(self.saved, map_location=device) if self.saved.exists() else None
        if state is None:
            table = hash_table(self.config, args.folder)
            params = {n: t.to(device) for n, t in start(self.config, table, args.seed).items()}
        else:
            params = state["params"]
        self.params: Params = {n: t.requires_grad_(trained(n)) for n, t in params.items()}
        self.optimiser = Optimiser(self.params)
        self.step = self.tokens = self.first = 0
        if state is not None:
            self.step, self.tokens = state["step"], state["tokens"]
            self.first = self.step
            if not args.restart:
                self.optimiser.load(state["optimiser"])
                self.first -= args.warmup  # warm already
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        compiled = device.type == "cuda" and not args.no_compile
        self.net = Net(self.config, self.params, dtype, compiled)
        self.judge = Net(self.config, self.params, dtype)  # no gradients, so not worth compiling
        self.biases = self._biases()

    def _biases(self) -> list[tuple[int, Tensor]]:
        scored = [i for i in self.config.layers if not self.config.is_hash(i)]
        found = [(i, self.params[f"layers.{i}.ffn.gate.bias"]) for i in scored]
        return [*found, (self.config.num_hidden_layers, self.params["mtp.0.ffn.gate.bias"])]

    def rate(self, progress: float) -> float:
        """Learning rate."""
        warm = min(1.0, (self.step - self.first + 1) / self.args.warmup)
        fall = max(0.01, 1 - progress) if self.args.final else 1.0
        return float(self.args.lr * warm * fall)

    def train_step(self, tokens: Tensor, weight: Tensor, progress: float) -> tuple[Losses, Tensor]:
        """One step."""
        self.net.dense = progress < self.args.dense
        self.net.quantise = progress >= self.args.quantise
        losses = self.net.losses(tokens, weight)
        (losses.lm + MTP_WEIGHT * losses.mtp + INDEX_WEIGHT * losses.index).backward()
        lr = self.rate(progress)
        norm = self.optimiser.step(lr)
        speed = self.args.bias_speed * lr / self.args.lr
        with torch.no_grad():
            for layer, bias in self.biases:
                bias += speed * torch.sign(losses.load[layer].mean() - losses.load[layer])
        self.step += 1
        self.tokens += weight.numel()
        return losses, norm

    def save(self) -> None:
        """Everything for the next run, and the parameters in small files."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        optimiser = self.optimiser.state()
        params = {n: p.detach() for n, p in self.params.items()}
        state = {"params": params, "optimiser": optimiser, "step": self.step, "tokens": self.tokens}
        torch.save(state, self.saved.with_suffix(".new"))
        self.saved.with_suffix(".new").rename(self.saved)
        save_parts(params, self.args.out / "weights")


@torch.no_grad()
def report(trainer: Trainer, held_out: list[tuple[Tensor, Tensor, str]], assistant: int) -> dict:
    """Held-out loss by kind of row, recall, draft agreement and expert load."""
    found: dict[str, float] = {}
    worst = 0.0
    for tokens, weight, kind in held_out:
        losses = trainer.judge.losses(tokens, weight)
        found[kind] = losses.lm.item()
        found[f"{kind}_draft"] = losses.right.item()
        if kind == "recall":
            found["index"] = losses.index.item()
            found["answers"] = answers_right(tokens, losses.best, weight)
        worst = max(worst, float((losses.load.amax(1) / losses.load.mean(1)).max()))
    return {**{k: round(v, 3) for k, v in found.items()}, "load": round(worst, 2)}


def answers_right(tokens: Tensor, best: Tensor, weight: Tensor) -> float:
    """Share of answers (runs of weight 1) that greedy decoding gives token for token."""
    answer = weight >= 1
    wrong = answer & (best != tokens[:, 1:])
    starts = answer & ~torch.cat([torch.zeros_like(answer[:, :1]), answer[:, :-1]], dim=1)
    number = starts.long().flatten().cumsum(0) * answer.flatten()
    bad = torch.unique(number[wrong.flatten()]).numel()
    return 1 - bad / max(1, int(starts.sum()))


def main() -> None:
    """Train."""
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 32
    trainer = Trainer(args, device)
    print(counts(trainer.config), "step", trainer.step, flush=True)
    recipe = Recipe(args.rows, args.length, *args.shares)
    source = Source(args.folder, "held_out")
    held_out = []
    for kind in ("text", "short", "recall"):
        only = {"text": 0.0, "short": 0.0, "recall": 0.0, kind: 1.0}
        batch = source.batch(Recipe(args.rows, args.length, **only), 10**9 + 7)
        held_out.append((*(t.to(device) for t in batch), kind))
    feed = stream(args.folder, recipe, args.seed, trainer.step, args.workers)
    begun = at = time.monotonic()
    log = args.out / "log.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    next_report, first, average, counting = args.report, trainer.tokens, None, False
    while True:
        elapsed = time.monotonic() - begun
        progress = elapsed / args.seconds
        if elapsed >= next_report or progress >= 1:
            seconds = time.monotonic() - at
            speed = (trainer.tokens - first) / max(seconds, 1e-6)
            told = report(trainer, held_out, source.assistant)
            line = {"step": trainer.step, "tokens": trainer.tokens, "s": round(elapsed), "tok/s": round(speed), "loss": average and round(average, 3), **told}  # fmt: skip
            print(json.dumps(line), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            at, first = time.monotonic(), trainer.tokens
            next_report = elapsed + args.report
        if progress >= 1:
            break
        tokens, weight = (t.to(device, non_blocking=True) for t in next(feed))
        losses, _ = trainer.train_step(tokens, weight, progress)
        if trainer.step % 10 == 0:
            average = (
                losses.lm.item() if average is None else 0.8 * average + 0.2 * losses.lm.item()
            )
        if not counting:  # compilation is over
            torch.cuda.synchronize() if device.type == "cuda" else None
            print(f"first step after {time.monotonic() - begun:.0f} s", flush=True)
            begun = at = time.monotonic()
            counting, first = True, trainer.tokens
    trainer.save()


if __name__ == "__main__":
    main()
