"""Time exchanges between GPUs: one call of all-to-all beside grouped sends and receives.

    PYTHONPATH=src:. python bench/nccl_exchange.py [--ranks 2 4] [--device cpu]

Every rank sends the same number of bytes to every other. Then a step's two legs alone, every rank home and
shard at once: rows of 7,168 BF16 values to the shards and back, in a graph, the way steps of fixed sizes
send them (`engine/fixed.py`): each row to every shard, each (row, choice) from every shard. `--device cpu`
tries the program over gloo.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench.machine import heading
from bench.spread import children, serve

from whalepod.cluster.fabric import Fabric
from whalepod.cluster.rendezvous import Rendezvous, connect
from whalepod.engine.fixed_form import FixedForm

SIZES = (14 << 10, 112 << 10, 1 << 20, 16 << 20)
TOKENS = (16, 128)
TURNS = 30


class Rank:
    """One process's part."""

    def __init__(self, device: str) -> None:
        self.cuda, self.device = device == "cuda", device
        self.fabric: Fabric | None = None

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do as told."""
        if order["do"] == "enter":
            self.fabric = connect(
                1,
                order["rank"],
                order["names"],
                address=tuple(order["address"]),
                backend="nccl" if self.cuda else "gloo",
                host="127.0.0.1",
                deadline_s=60,
            )
            return {"kind": "entered"}
        assert self.fabric is not None
        act = self.exchange if order["do"] == "exchange" else self.legs
        return {"kind": "took", "us": act(self.fabric, order["amount"], order.get("way", "")) * 1e6}

    def exchange(self, fabric: Fabric, size: int, way: str) -> float:
        """Seconds of one exchange of `size` bytes a pair."""
        sizes = [0 if r == fabric.rank else size for r in range(fabric.size)]
        data = torch.randint(0, 255, (sum(sizes),), dtype=torch.uint8, device=self.device)
        out = torch.empty_like(data)

        def in_one_call() -> None:
            fabric.all_to_all(0, out, data, sizes, sizes).wait()

        def grouped() -> None:
            group = fabric._lanes[0]  # type: ignore[attr-defined]
            group._start_coalescing()
            for peer, (mine, theirs) in enumerate(
                zip(data.split(sizes), out.split(sizes), strict=True)
            ):
                if peer != fabric.rank:
                    group.send([mine], peer, 0)
                    group.recv([theirs], peer, 0)
            group._end_coalescing().wait()

        return self._timed(fabric, in_one_call if way == "all_to_all" else grouped)

    def legs(self, fabric: Fabric, tokens: int, way: str) -> float:
        """Seconds of the legs of one pass in which every rank brings `tokens` rows."""
        form, peers = FixedForm(7168, torch.bfloat16, 6, fabric.size), range(fabric.size)
        there, back = form.to_shard(tokens), form.to_home(tokens, wide=False)
        a, b = (
            [torch.zeros(n * fabric.size, dtype=torch.uint8, device=self.device) for _ in range(2)]
            for n in (there, back)
        )

        def both() -> None:
            fabric.all_to_all(1, a[0], a[1], [there for _ in peers], [there for _ in peers]).wait()
            fabric.all_to_all(2, b[0], b[1], [back for _ in peers], [back for _ in peers]).wait()

        return self._timed(fabric, both, graph=True)

    def _timed(self, fabric: Fabric, call: Callable[[], None], graph: bool = False) -> float:
        for _ in range(3):
            call()
        if not self.cuda:
            times = []
            for _ in range(TURNS):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return statistics.median(times)
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                call()
            call = captured.replay
        pairs = []
        for _ in range(TURNS):
            start_at, end_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_at.record()
            call()
            end_at.record()
            pairs.append((start_at, end_at))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    if args.child is not None:
        serve(Rank(args.device).obey)
        return
    print(heading(" ".join(["python", *sys.argv])))
    ways = ["all_to_all", "grouped"] if args.device == "cuda" else ["all_to_all"]
    print("\n| ranks | bytes a pair | " + " | ".join(f"{w} us" for w in ways) + " | GB/s out |")
    print("|---" * (len(ways) + 3) + "|")
    legs = ["\n| ranks | rows a rank | there and back us | MB out |\n|---|---|---|---|"]
    for count in args.ranks:
        rendezvous = Rendezvous("127.0.0.1")
        names = [f"m{i}" for i in range(count)]
        with children(__file__, count, args.device == "cuda", "--device", args.device) as ranks:

            def all_of(kind: str, ranks: Any = ranks, **order: Any) -> list[dict[str, Any]]:
                for i, rank in enumerate(ranks):
                    rank.tell(rank=i, **order)
                return [rank.hear(kind) for rank in ranks]

            all_of("entered", do="enter", names=names, address=rendezvous.address)
            for size in SIZES:
                took = [
                    max(a["us"] for a in all_of("took", do="exchange", amount=size, way=way))
                    for way in ways
                ]
                rate = size * (count - 1) / min(took) / 1e3
                told = " | ".join(f"{t:.1f}" for t in took)
                print(f"| {count} | {size:,} | {told} | {rate:.1f} |", flush=True)
            form = FixedForm(7168, torch.bfloat16, 6, count)
            for tokens in TOKENS:
                us = max(a["us"] for a in all_of("took", do="legs", amount=tokens))
                out = (form.to_shard(tokens) + form.to_home(tokens, wide=False)) * (count - 1)
                legs.append(f"| {count} | {tokens} | {us:.1f} | {out / 1e6:.2f} |")
    print("\n".join(legs))


if __name__ == "__main__":
    main()
