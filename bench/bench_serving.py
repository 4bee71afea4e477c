"""Time what clients see: first token and each further one, over HTTP and gRPC, on Ray.

    python bench/bench_serving.py [--model DIR] [--rounds 5] [--out FILE.md]

For each layout it starts `whalepod up` in a state folder of its own on free loopback ports, streams
greedy completions at 1 and 8 at once, and stops it again. The same requests through the engine in
this process, without Ray and ingress, are the comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpc
import httpx
import torch
from machine import heading, quantiles

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tiny import make_tiny
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

PROMPT, TOKENS = 32, 48
LAYOUTS = {
    "single on Ray": ["topology.layout=single"],
    "afd 1+1+2 on Ray, gloo": ["topology.experts=2"],
    "afd 1+2 on Ray, gloo, router seated": ["topology.experts=2", "topology.router=attention"],
}
LEGS = {"single on Ray": 0, "afd 1+1+2 on Ray, gloo": 3, "afd 1+2 on Ray, gloo, router seated": 2}
Stamps = list[float]  # when each token came, seconds after the request was sent
Stream = Callable[[list[int]], AsyncIterator[object]]


def prompts(count: int) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(count)
    made: list[list[int]] = torch.randint(3, 900, (count, PROMPT), generator=generator).tolist()
    return made


def in_process(source: Source, at_once: int, rounds: int) -> list[Stamps]:
    """The engine alone."""
    config = Config.from_dict(
        {"model": {"path": str(source.checkpoint.path)}, "topology": {"layout": "single"}}
    )
    found = []
    with torch.inference_mode():
        engine = SingleEngine(config, source)
        for _ in range(rounds):
            requests = [
                Request(str(i), tuple(p), TOKENS, Sampling(0.0), ignore_eos=True)
                for i, p in enumerate(prompts(at_once))
            ]
            stamps: dict[str, Stamps] = {r.id: [] for r in requests}
            start = time.perf_counter()
            for event in engine.run(requests):
                stamps[event.request_id].append(time.perf_counter() - start)
            found += stamps.values()
    return found


@contextmanager
def serving(folder: Path, overrides: list[str]) -> Iterator[tuple[str, str]]:
    """A running cluster: HTTP base URL and gRPC address."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "WHALEPOD_STATE": state}
        whalepod = [sys.executable, "-m", "whalepod"]
        sets = [f"server.http_port={ports[0]}", f"server.grpc_port={ports[1]}", *overrides]
        flags = [part for item in sets for part in ("--set", item)]
        up = [*whalepod, "up", "--model", str(folder), *flags]
        subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
        try:
            yield f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        finally:
            subprocess.run([*whalepod, "down"], env=environment, stdout=subprocess.DEVNULL)


async def http_tokens(client: httpx.AsyncClient, url: str, ids: list[int]) -> AsyncIterator[object]:
    """Tokens of one streamed completion."""
    body = {
        "prompt": ids,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                for token in json.loads(line[6:])["choices"][0]["token_ids"]:
                    yield token


async def grpc_tokens(stub: Any, ids: list[int]) -> AsyncIterator[object]:
    """Tokens of one streamed completion."""
    sampling = pb.Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    request = pb.CompleteRequest(tokens=pb.TokenIds(ids=ids), sampling=sampling)
    async for part in stub.CompleteStream(request):
        for token in part.token_ids:
            yield token


async def time_streams(stream: Stream, at_once: int, rounds: int) -> list[Stamps]:
    """Run rounds of concurrent streams; the first round warms up."""

    async def one(ids: list[int]) -> Stamps:
        start = time.perf_counter()
        return [time.perf_counter() - start async for _ in stream(ids)]

    found = []
    for number in range(rounds + 1):
        done = await asyncio.gather(*(one(ids) for ids in prompts(at_once)))
        found += done if number else []
    return found


async def time_edges(http: str, address: str, rounds: int) -> dict[tuple[str, int], list[Stamps]]:
    """Both protocols at 1 and 8 streams."""
    found = {}
    async with (
        httpx.AsyncClient(timeout=60, trust_env=False) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.InferenceStub(channel)
        edges: dict[str, Stream] = {
            "HTTP": lambda ids: http_tokens(client, http, ids),
            "gRPC": lambda ids: grpc_tokens(stub, ids),
        }
        for at_once in (1, 8):
            for name, stream in edges.items():
                found[name, at_once] = await time_streams(stream, at_once, rounds)
    return found


def row(what: str, edge: str, at_once: int, stamps: list[Stamps]) -> tuple[str, float, float]:
    """A table row, the median time to the first token and the median step, in ms."""
    first = quantiles([s[0] for s in stamps])
    gaps = quantiles([b - a for s in stamps for a, b in pairwise(s)])
    rate = at_once * (TOKENS - 1) / (sum(s[-1] - s[0] for s in stamps) / len(stamps))
    text = (
        f"| {what} | {edge} | {at_once} | {first[1]:.1f} ({first[0]:.1f}-{first[2]:.1f}) | "
        f"{gaps[1]:.2f} ({gaps[0]:.2f}-{gaps[2]:.2f}) | {rate:.0f} |"
    )
    return text, first[1], gaps[1]


def main() -> None:
    """Measure, print tables, and write them when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or make_tiny(Path(tempfile.mkdtemp()) / "tiny")
    source = Source(
        Config.from_dict({"model": {"path": str(folder)}}).model, Checkpoint.open(folder)
    )
    lines = [
        f"Prompts of {PROMPT} tokens, {TOKENS} generated; median (p10-p90).",
        "",
        "| what | edge | streams | ms to first token | ms between tokens | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[tuple[str, str, int], float] = {}
    step: dict[tuple[str, str, int], float] = {}
    for at_once in (1, 8):
        key = ("engine in process", "-", at_once)
        text, first[key], step[key] = row(*key, in_process(source, at_once, options.rounds))
        lines.append(text)
    for name, overrides in LAYOUTS.items():
        with serving(folder, overrides) as (http, address):
            measured = asyncio.run(time_edges(http, address, options.rounds))
        for (edge, at_once), stamps in measured.items():
            key = (name, edge, at_once)
            text, first[key], step[key] = row(*key, stamps)
            lines.append(text)
            print(text, file=sys.stderr, flush=True)
    lines += ["", *derived(first, step, source.config.num_hidden_layers)]
    text = "\n".join(
        [heading(f"python bench/bench_serving.py --rounds {options.rounds}"), "", *lines, ""]
    )
    print(text)
    if options.out:
        options.out.write_text(f"# Serving the small model\n\n{text}")


def derived(
    first: dict[tuple[str, str, int], float], step: dict[tuple[str, str, int], float], layers: int
) -> list[str]:
    """What Ray and ingress add to the first token, and what a leg adds to a step."""
    out = ["| streams | edge | ms added to the first token by Ray and ingress |", "|---|---|---|"]
    for at_once in (1, 8):
        for edge in ("HTTP", "gRPC"):
            added = first["single on Ray", edge, at_once] - first["engine in process", "-", at_once]
            out.append(f"| {at_once} | {edge} | {added:.1f} |")
    out += [
        "",
        "| what | streams | ms a leg adds to a step (against single on Ray) |",
        "|---|---|---|",
    ]
    for name, legs in LEGS.items():
        for at_once in (1, 8) if legs else ():
            added = step[name, "gRPC", at_once] - step["single on Ray", "gRPC", at_once]
            out.append(f"| {name} | {at_once} | {added / (legs * layers):.3f} |")
    return out


if __name__ == "__main__":
    main()
