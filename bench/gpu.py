"""Time kernels on a GPU beside the rates of the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Args:
        kernel, size: what was measured, e.g. `fp4_experts` and `flash M=64`.
        seconds: of one call.
        bytes, flops: least traffic and arithmetic that the call must do.
        peers: seconds of others on the same inputs in the same run.
    """

    kernel: str
    size: str
    seconds: float
    bytes: float = 0.0
    flops: float = 0.0
    peers: tuple[tuple[str, float], ...] = ()


def timed(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call, from replays of a graph, with a cold cache.

    Args:
        calls: the same work over different inputs; a call must not synchronise. Several are
            captured one after the other, so the start of a graph is shared among them: pass so
            many that their inputs together exceed the cache. The cache is flushed before each
            replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which may still draw the inputs
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median([graph.replay], repeats) / len(calls)


def timed_eagerly(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Like `timed` for what cannot be captured: launch gaps are in the figure."""
    for call in calls:
        call()
    return _median(calls, repeats)


def _median(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for i in range(repeats):
        flush.random_(0, 255)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def profile(run: Callable[[], object], calls: int) -> str:
    """A table of the kernels that a pass spends its time in: launches and microseconds of one pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in found) / calls
    lines = ["", f"| kernel | launches | us of {total:.0f} |", "|---|---|---|"]
    for e in found[:20]:
        name = e.key.split("<")[0].replace("void ", "")[-44:]
        lines.append(f"| {name} | {e.count / calls:.0f} | {e.self_device_time_total / calls:.1f} |")
    return "\n".join(lines) + "\n"


def copy_rate() -> float:
    """Bytes per second of a device copy, read and written bytes both counted."""
    src = torch.randint(0, 1 << 30, (512 << 20,), dtype=torch.int32, device="cuda")
    dst = torch.empty_like(src)
    # A kernel: a copy captured in a graph takes another way, far below the rate of the memory.
    return 2 * src.nbytes / timed([lambda: torch.add(src, 1, out=dst)])


def matrix_rate() -> float:
    """bf16 operations per second of an 8192-cubed product of random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed([lambda: a @ b])


def table(rows: Sequence[Row], copy: float, matrix: float) -> str:
    """Markdown: time, traffic, fractions of the two rates, and peers."""
    lines = [
        "| kernel | size | us | MB | of copy rate | of matrix rate | peers |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        moved, made = r.bytes / r.seconds / copy, r.flops / r.seconds / matrix
        peers = ", ".join(f"{n} {s * 1e6:.1f} us ({s / r.seconds:.1f} x)" for n, s in r.peers)
        lines.append(
            f"| {r.kernel} | {r.size} | {r.seconds * 1e6:.1f} | {r.bytes / 1e6:.2f} | "
            f"{moved:.0%} | {made:.0%} | {peers} |"
        )
    return "\n".join(lines)
