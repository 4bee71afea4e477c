"""Members on GPUs of their own, over NCCL: the same tokens, steps beside each other, a lost expert.

    PYTHONPATH=src:. python bench/nccl_members.py [--gpus 4] [--part tokens rates legs loss]
        [--layers 8] [--layouts "ep 4" ...] [--micro-batches 2] [--kernels] [--model DIR --device cpu]

Every member is a process with a GPU; this one makes epochs, as the controller does. Weights are random, of
some layers of V4-Flash with all experts, the same in every process; `--model` reads a checkpoint instead, and
`--device cpu` tries the program over gloo. `tokens` compares greedy tokens with the first layout's
(`single`). `rates` counts tokens while every request decodes, the same requests on the same number of GPUs for `ep` and `afd`. `legs`
says what the members' devices do meanwhile, `--kernels` by kernel: NCCL's include the time that they wait. `loss`
ends an expert member's process by SIGKILL under streams, with every expert on two shards and on one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from bench.machine import heading
from bench.nccl_child import One, open_checkpoint
from bench.spread import Child, children, serve

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.placement import Placement
from whalepod.cluster.rendezvous import Rendezvous
from whalepod.cluster.topology import MemberInfo, seat, wanted
from whalepod.config import Config
from whalepod.model.shape import ModelConfig

# Context, requests a GPU, and tokens that each of them makes.
RATES = ((1024, 32, 64), (8192, 8, 48), (32768, 2, 48))


def settings(args: argparse.Namespace, **topology: Any) -> Config:
    """The configuration of every process."""
    cuda = args.device == "cuda"
    if topology.get("layout") != "single":
        topology["micro_batches"] = args.micro_batches
    return Config.from_dict(
        {
            "model": {"path": args.model or "random", "dtype": "bf16" if cuda else "fp32"},
            "topology": topology,
            "engine": {
                "max_batch": 128 if cuda else 16,
                "max_step_tokens": 8192 if cuda else 512,
                "prefix_snapshots": 0,
                "kv_tokens": (3 << 20) if cuda else 1 << 16,
                "max_context": 40000 if cuda else 4096,
            },
            "cluster": {"fabric": "nccl" if cuda else "gloo", "step_deadline_s": 60},
        }
    )


class Layout:
    """What the controller does: epochs over the processes of one layout."""

    def __init__(self, args: argparse.Namespace, ranks: list[Child], **topology: Any) -> None:
        self.config = settings(args, **topology)
        self.model = open_checkpoint(args, "cpu").config
        self.rendezvous = Rendezvous("127.0.0.1")
        self.infos: list[MemberInfo] = wanted(self.config.topology)
        self.of = {info.name: rank for info, rank in zip(self.infos, ranks, strict=True)}
        self.epoch: Epoch | None = None

    def enter(self, replicas: int = 0) -> list[dict[str, Any]]:
        """Make the next epoch of those who are there."""
        seats, before = seat(self.config.topology, self.infos), self.epoch
        shards = tuple(s.name for s in seats if "expert" in s.roles)
        layers, experts = self.model.num_hidden_layers, self.model.n_routed_experts
        placement = (
            before.placement.moved_to(shards)
            if before
            else Placement.balanced(layers, experts, shards, replicas)
        )
        own = any(s.roles == ("router",) for s in seats)
        self.epoch = Epoch(
            before.id + 1 if before else 1,
            seats,
            placement,
            "own" if own else "attention",
            self.config.digest,
            self.config.cluster.fabric if len(seats) > 1 else "gloo",
            self.rendezvous.address,
        )
        plain, config = self.epoch.to_dict(), self.config.model_dump()
        for name in self.epoch.names:
            self.of[name].tell(do="enter", name=name, epoch=plain, config=config)
        return [self.of[name].hear("entered") for name in self.epoch.names]

    def submit(self, requests: list[dict[str, Any]]) -> list[Child]:
        """Spread requests over the attention members; returns those that have some."""
        assert self.epoch is not None
        homes = [self.of[s.name] for s in self.epoch.members if "attention" in s.roles]
        for i, home in enumerate(homes):
            if requests[i :: len(homes)]:
                home.tell(do="submit", requests=requests[i :: len(homes)])
        return homes[: len(requests)]

    def run(self, requests: list[dict[str, Any]]) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """Tokens, and the times at which they came."""
        tokens: dict[str, list[int]] = {}
        times: dict[str, list[float]] = {}
        for home in self.submit(requests):
            said = home.hear("done")
            tokens |= said["tokens"]
            times |= said["times"]
        return tokens, times

    def lose(self, name: str) -> float:
        """End a member's process, and make the next epoch once the others have noticed."""
        killed = time.time()
        self.of[name].process.send_signal(signal.SIGKILL)
        self.infos = [i for i in self.infos if i.name != name]
        noticed = max(self.of[i.name].hear("lost")["at"] for i in self.infos)
        return noticed - killed


def requests(model: ModelConfig, count: int, length: int, tokens: int) -> list[dict[str, Any]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.vocab_size - 20, (count, length), generator=generator).tolist()
    return [{"id": f"r{i}", "ids": one, "tokens": tokens} for i, one in enumerate(ids)]


def layouts(gpus: int) -> dict[str, dict[str, Any]]:
    """Those that fit so many."""
    found: dict[str, dict[str, Any]] = {f"ep {gpus}": {"layout": "ep", "attention": gpus}}
    for attention in range(1, gpus // 2 + 1):
        shape = {"attention": attention, "experts": gpus - attention, "router": "attention"}
        found[f"afd {attention}+seated+{gpus - attention}"] = shape
    if gpus > 3:
        found["afd 1+1+2"] = {"attention": 1, "routers": 1, "experts": 2}
    return found


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
    print("\n| layout | member | exchange | experts | other kernels |\n|---|---|---|---|---|")
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
                parts = (seen[k] for k in ("exchange", "experts", "other"))
                print(f"| {name} | {member} | " + " | ".join(f"{p:.0%}" for p in parts) + " |")
                if args.kernels:
                    print("  ", seen["most"], flush=True)


def loss(args: argparse.Namespace, cuda: bool) -> None:
    """The table of `loss`."""
    experts = args.gpus - 1
    if experts < 2:
        raise SystemExit(
            "an expert is lost among two expert members or more: --gpus 3, or leave `loss` out"
        )
    shape = {"attention": 1, "experts": experts, "router": "attention"}
    print(
        "\n| experts | noticed ms | next epoch s | prepare, connect s | longest pause s | requests with other tokens |"
    )
    print("|---|---|---|---|---|---|")
    for replicas, words in ((1, "on two shards"), (0, "on one shard")):
        with children(__file__, args.gpus, cuda, *passed(args)) as ranks:
            layout = Layout(args, ranks, **shape)
            layout.enter(replicas)
            todo = requests(layout.model, 16, 300 if cuda else 40, 400)
            want, _ = layout.run(todo)
            (home,) = layout.submit(todo)[:1]
            time.sleep(1.0)
            noticed = layout.lose(f"experts-{experts - 1}")
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
    parser.add_argument("--micro-batches", type=int, default=2)
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
