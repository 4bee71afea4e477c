"""Epochs over processes with a GPU each, made as the controller makes them; for `nccl_members.py`."""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

import torch
from bench.nccl_child import open_checkpoint
from bench.spread import Child

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.placement import Placement
from whalepod.cluster.rendezvous import Rendezvous
from whalepod.cluster.topology import MemberInfo, seat, wanted
from whalepod.config import Config
from whalepod.model.shape import ModelConfig


def settings(args: argparse.Namespace, **topology: Any) -> Config:
    """The configuration of every process."""
    cuda = args.device == "cuda"
    if topology.get("layout") != "single":
        rows = 16 if args.micro_batches > 1 else None  # or decoding steps would stay whole
        topology |= {"micro_batches": args.micro_batches, "micro_batch_rows": rows}
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
        # All prepare before anybody waits for the others: kernels may have to be compiled.
        told = {}
        for name in self.epoch.names:
            self.of[name].tell(do="prepare", name=name, epoch=plain, config=config)
        for name in self.epoch.names:
            told[name] = self.of[name].hear("prepared")
        for name in self.epoch.names:
            self.of[name].tell(do="enter", epoch=plain)
        return [told[name] | self.of[name].hear("entered") for name in self.epoch.names]

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

    def change(self, infos: list[MemberInfo]) -> list[dict[str, Any]]:
        """Stop this epoch at a step's end, and make the next one of these members."""
        assert self.epoch is not None
        names = self.epoch.names
        self.of[names[0]].tell(do="stop")
        for name in names:
            self.of[name].hear("ended")
        self.infos = infos
        return self.enter()

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
