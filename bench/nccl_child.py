"""A member in a process of its own, told what to do by `nccl_members.py`."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import torch
from bench.gpu_step import RATIOS
from bench.random_weights import RandomCheckpoint
from bench.spread import say

from whalepod.cluster.epoch import Epoch
from whalepod.cluster.fabric import Fabric
from whalepod.cluster.rendezvous import connect
from whalepod.config import Config
from whalepod.engine.member import Member
from whalepod.engine.request import Request, Sampling, TokenEvent
from whalepod.engine.source import Source
from whalepod.errors import EpochLost
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.shape import ModelConfig

# What device kernels are for, by a part of their names.
KERNELS = {"nccl": "exchange", "gate_up": "experts", "down_kernel": "experts"}
# Kernels that a layer of a micro-batch launches once, on members with experts and on those that route.
ONCE = ("gate_up", "_hand_out_kernel")


def sliced(layers: int) -> ModelConfig:
    """So many layers of V4-Flash, with both kinds of compressed attention where eight are few."""
    known = ModelConfig.from_file(Path("configs/models/deepseek-v4-flash.json")).model_dump()
    ratios = RATIOS if layers <= len(RATIOS) else known["compress_ratios"]
    changes = {"num_hidden_layers": layers, "num_nextn_predict_layers": 0}
    return ModelConfig.from_dict({**known, **changes, "compress_ratios": [*ratios[:layers]]})


def open_checkpoint(args: argparse.Namespace, device: str) -> Checkpoint:
    """The one to serve."""
    if args.model:
        return Checkpoint.open(args.model)
    return RandomCheckpoint(sliced(args.layers), device)


class One:
    """One member's process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.member: Member | None = None
        self.fabric: Fabric | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.times: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.open: set[str] = set()

    def obey(self, order: dict[str, Any]) -> dict[str, Any] | None:
        """Do as told."""
        if order["do"] == "prepare":
            return self.prepare(order)
        if order["do"] == "enter":
            return self.enter(order)
        if order["do"] == "watch":
            return watch(order["seconds"])
        if order["do"] == "stop":
            self.stop.set()
            return None
        assert self.member is not None
        loop = self.member.loop
        assert loop is not None
        self.times, self.tokens = {}, {}
        made = [
            Request(r["id"], tuple(r["ids"]), r["tokens"], Sampling(0.0), ignore_eos=True)
            for r in order["requests"]
        ]
        self.open = {r.id for r in made}
        for request in made:
            loop.submit(request)
        return None

    def prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        """Load what an epoch needs, once the last one has ended."""
        name, config = order["name"], Config.from_dict(order["config"])
        epoch = Epoch.from_dict(order["epoch"])
        if self.member is None:
            checkpoint = open_checkpoint(self.args, self.args.device)
            source = Source(config.model, checkpoint, self.args.device)
            self.member = Member(name, config, source, self.emit)
        if self.thread is not None:
            self.thread.join(60)
        start = time.monotonic()
        with torch.inference_mode():
            self.member.prepare(epoch)
        return {"kind": "prepared", "prepare_s": time.monotonic() - start}

    def enter(self, order: dict[str, Any]) -> dict[str, Any]:
        """Meet the others, and serve."""
        assert self.member is not None
        epoch, start = Epoch.from_dict(order["epoch"]), time.monotonic()
        self.fabric = connect(
            epoch.id,
            epoch.rank_of(self.member.name),
            epoch.names,
            address=epoch.rendezvous,
            backend=epoch.backend,
            host="127.0.0.1",
            deadline_s=self.member.config.cluster.step_deadline_s,
            rendezvous_s=120,
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(epoch, self.fabric), daemon=True)
        self.thread.start()
        return {"kind": "entered", "connect_s": time.monotonic() - start}

    def run(self, epoch: Epoch, fabric: Fabric) -> None:
        """Serve until the epoch ends."""
        assert self.member is not None
        try:
            with torch.inference_mode():
                self.member.serve(epoch, fabric, self.stop)
            say(kind="ended")
        except EpochLost as error:
            say(kind="lost", at=time.time(), why=str(error))
        except Exception as error:
            say(kind="failed", why=repr(error))
        finally:
            fabric.close()

    def emit(self, event: TokenEvent) -> None:
        """Note a token, and say when the last has come."""
        seen = self.times.setdefault(event.request_id, [])
        seen.append(time.time())
        if len(seen) == 4 and all(len(self.times.get(r, ())) > 3 for r in self.open):
            say(kind="decoding")
        self.tokens.setdefault(event.request_id, []).append(event.token)
        if event.finish is not None:
            self.open.discard(event.request_id)
            if not self.open:
                say(kind="done", tokens=self.tokens, times=self.times)


def watch(seconds: float) -> dict[str, Any]:
    """What the device does for a layer of a micro-batch, in microseconds, by what it is for and by kernel."""
    of, each = dict.fromkeys(("exchange", "experts", "other"), 0.0), dict[str, list[float]]()
    passes = 0
    if torch.cuda.is_available():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            time.sleep(seconds)
        for event in seen.key_averages():
            name, spent = event.key.lower(), event.self_device_time_total
            what = next((w for part, w in KERNELS.items() if part in name), "other")
            of[what] += spent
            each[event.key[:40]] = [spent, event.count]
            if any(part in name for part in ONCE):
                passes = max(passes, event.count)
    else:
        time.sleep(seconds)
    most = dict(sorted(each.items(), key=lambda item: -item[1][0])[:12])
    each_pass = {what: spent / max(1, passes) for what, spent in of.items()}
    return {"kind": "watched", "most": most, "passes": passes, **each_pass}
