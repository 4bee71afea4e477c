"""Members on GPUs of their own, over NCCL: the same tokens, steps beside each other, a lost expert.

    PYTHONPATH=src:. python bench/nccl_members.py [--gpus 4] [--part tokens rates legs loss]
        [--layers 8] [--layouts "ep 4" ...] [--micro-batches 1] [--kernels] [--model DIR --device cpu]

Every member is a process with a GPU; this one makes epochs, as the controller does. Weights are random, of
some layers of V4-Flash with all experts, the same in every process; `--model` reads a checkpoint instead, and
`--device cpu` tries the program over gloo. `tokens` compares greedy tokens with the first layout's
(`single`). `rates` counts tokens while every request decodes, the same requests on the same number of GPUs for `ep` and `afd`. `legs`
says what the members' devices do for a layer of a micro-batch, `--kernels` by kernel: NCCL's include the
time that they wait. The profiler slows steps down, so their own time is not in it. `loss`
ends an expert member's process by SIGKILL under streams, with every expert on two shards and on one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import pairwise

import torch
from bench.machine import heading
from bench.nccl_child import One, open_checkpoint
from bench.nccl_layout import Layout, layouts, requests
from bench.spread import children, serve

# Context, requests a GPU, and tokens that each of them makes.
RATES = ((1024, 32, 64), (8192, 8, 48), (32768, 2, 48))


def steady(times: dict[str, list[float]]) -> tuple[float, float]:
    """Tokens a second, and milliseconds a step, while every request decodes."""
    start, end = max(t[2] for t in times.values()), min(t[-1] for t in times.values())
    if start >= end:
        raise RuntimeError("at no time did all requests decode: make fewer, or more tokens of each")
    made = sum(sum(start < x <= end for x in t) for t in times.values())
    return made / (end - start), (end - start) / (made / len(times)) * 1e3


def tokens_and_rates(args: argparse.Namespace, cuda: bool) -> None:
    """Tables of `tokens` and of `rates`."""
    small = requests(open_checkpoint(args, "cpu").config, 16, 300 if cuda else 40, 32)
    alone: dict[str, list[int]] = {}
    shapes = {"single": {"layout": "single"}, **layouts(args.gpus)}
    if args.layouts:
        shapes = {name: shapes[name] for name in args.layouts}
    print(
        "| layout | start s | requests with other tokens | rates: context, tokens/s a GPU, ms a step |"
    )
    print("|---|---|---|---|")
    for name, shape in shapes.items():
        count = 1 if name == "single" else args.gpus
        with children(__file__, count, cuda, *passed(args)) as ranks:
            layout, start = Layout(args, ranks, **shape), time.monotonic()
            layout.enter()
            found, _ = layout.run(small)
            began, alone = time.monotonic() - start, alone or found
            other = sum(found[r] != alone[r] for r in alone)
            told = []
            for context, each, tokens in RATES if "rates" in args.part else ():
                if name == "single":
                    continue
                count = args.gpus * (each if cuda else 3)
                many = requests(layout.model, count, context if cuda else 64, tokens)
                rate, step = steady(layout.run(many)[1])
                told.append(f"{context:,}: {rate / args.gpus:,.0f}, {step:.2f}")
            print(
                f"| {name} | {began:.1f} | {other} of {len(alone)} | {'; '.join(told)} |",
                flush=True,
            )


def legs(args: argparse.Namespace, cuda: bool) -> None:
    """The table of `legs`."""
    print(
        "\n| layout | member | passes of a layer seen | exchange us a pass | experts | other kernels |"
        "\n|---|---|---|---|---|---|"
    )
    for name, shape in layouts(args.gpus).items():
        if args.layouts and name not in args.layouts:
            continue
        with children(__file__, args.gpus, cuda, *passed(args)) as ranks:
            layout = Layout(args, ranks, **shape)
            layout.enter()
            many = requests(
                layout.model, args.gpus * (32 if cuda else 3), 1024 if cuda else 40, 400
            )
            homes = layout.submit(many)
            for home in homes:
                home.hear("decoding")
            for rank in layout.of.values():
                rank.tell(do="watch", seconds=0.5)
            for member, rank in layout.of.items():
                seen = rank.hear("watched")
                parts = " | ".join(
                    f"{seen[k]:.0f}" for k in ("passes", "exchange", "experts", "other")
                )
                print(f"| {name} | {member} | {parts} |")
                if args.kernels:
                    print("  ", seen["most"], flush=True)


def loss(args: argparse.Namespace, cuda: bool) -> None:
    """The table of `loss`."""
    print(
        "\n| experts | noticed ms | next epoch s | prepare, connect s | longest pause s | requests with other tokens |"
    )
    print("|---|---|---|---|---|---|")
    if args.gpus < 3:
        lose_one(args, cuda, "in a spare process, too", 0)
        return
    lose_one(args, cuda, "on two shards", 1)
    lose_one(args, cuda, "on one shard", 0)


def lose_one(args: argparse.Namespace, cuda: bool, words: str, replicas: int) -> None:
    """A row of that table: the last expert member of an epoch is lost under streams.

    Two GPUs have no room for a second shard in one communicator. A process on the shard's own GPU that has
    loaded the same experts replaces it there.
    """
    spare = args.gpus < 3
    experts = args.gpus - 1 + spare
    with children(__file__, args.gpus, cuda, *passed(args), spare=spare) as ranks:
        layout = Layout(args, ranks, attention=1, experts=experts, router="attention")
        everyone = layout.infos
        if spare:
            layout.infos = [i for i in everyone if i.name != "experts-0"]
        layout.enter(replicas)
        todo = requests(layout.model, 16, 300 if cuda else 40, 400)
        want, _ = layout.run(todo)
        lost = "experts-0" if spare else f"experts-{experts - 1}"
        if spare:
            layout.change([i for i in everyone if i.name != "experts-1"])
            layout.run(todo)
        (home,) = layout.submit(todo)[:1]
        time.sleep(1.0)
        noticed = layout.lose(lost)
        if spare:
            layout.infos = [i for i in everyone if i.name != lost]
        start = time.monotonic()
        entered = layout.enter()
        took = time.monotonic() - start
        said = home.hear("done")
        gaps = [b - a for t in said["times"].values() for a, b in pairwise(t)]
        other = sum(said["tokens"][r] != want[r] for r in want)
        slow = [max(e[k] for e in entered) for k in ("prepare_s", "connect_s")]
        print(
            f"| {words} | {noticed * 1e3:.0f} | {took:.2f} | {slow[0]:.2f}, {slow[1]:.2f} | "
            f"{max(gaps):.2f} | {other} of {len(want)} |",
            flush=True,
        )


def passed(args: argparse.Namespace) -> list[str]:
    """Arguments for children."""
    always = ["--device", args.device, "--layers", str(args.layers)]
    return always + (["--model", args.model] if args.model else [])


def main() -> None:
    """Print the tables, or be a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--part", nargs="+", default=["tokens", "rates", "legs", "loss"])
    parser.add_argument("--model", default="")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layouts", nargs="+", default=[])
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    if args.child is not None:
        torch.set_num_threads(1)
        serve(One(args).obey)
        os._exit(0)
    print(heading(" ".join(["python", *sys.argv])) + "\n")
    cuda = args.device == "cuda"
    if {"tokens", "rates"} & {*args.part}:
        tokens_and_rates(args, cuda)
    if "legs" in args.part:
        legs(args, cuda)
    if "loss" in args.part:
        loss(args, cuda)


if __name__ == "__main__":
    main()
