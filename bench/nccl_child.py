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
        if order["do"] == "enter":
            return self.enter(order)
        if order["do"] == "watch":
            return watch(order["seconds"])
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

    def enter(self, order: dict[str, Any]) -> dict[str, Any]:
        """Load what an epoch needs, meet the others, and serve."""
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
        prepared = time.monotonic()
        self.fabric = connect(
            epoch.id,
            epoch.rank_of(name),
            epoch.names,
            address=epoch.rendezvous,
            backend=epoch.backend,
            host="127.0.0.1",
            deadline_s=config.cluster.step_deadline_s,
            rendezvous_s=120,
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(epoch, self.fabric), daemon=True)
        self.thread.start()
        now = time.monotonic()
        return {"kind": "entered", "prepare_s": prepared - start, "connect_s": now - prepared}

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
    """Share of a while that the device spends, by what it was for, and of its kernels the most costly."""
    start, of, each = time.monotonic(), dict.fromkeys(("exchange", "experts", "other"), 0.0), {}
    if torch.cuda.is_available():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            start = time.monotonic()  # the profiler takes seconds to begin
            time.sleep(seconds)
            took = time.monotonic() - start
        for event in seen.key_averages():
            name, spent = event.key.lower(), event.self_device_time_total / 1e6
            what = next((w for part, w in KERNELS.items() if part in name), "other")
            of[what] += spent / took
            each[event.key[:40]] = [round(spent / took, 4), event.count]
    else:
        time.sleep(seconds)
    most = dict(sorted(each.items(), key=lambda item: -item[1][0])[:12])
    return {"kind": "watched", "most": most, **of}
