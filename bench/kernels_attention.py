"""Time the attention kernels on one GPU: decode and prefill attention, index scores, selection.

PYTHONPATH=src:. python bench/kernels_attention.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench import gpu
from bench.machine import heading
from torch import Tensor

from whalepod.kernels.decode_attention import Entries, decode_attention
from whalepod.kernels.index_scores import KeyFormat, index_scores
from whalepod.kernels.prefill_attention import prefill_attention
from whalepod.kernels.select import select

DEVICE, BF16, WINDOW, DIMS, ROTARY = "cuda", torch.bfloat16, 128, 512, 64
# Bytes of inputs that a graph goes through, so that none is left in the cache from the last call.
_SPAN = 160 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """Heads and selected entries of a model."""

    name: str
    heads: int
    picks: int


FLASH, PRO = Size("flash", 64, 512), Size("pro", 128, 1024)


def sets(nbytes: float) -> int:
    """How many input sets a graph needs."""
    return max(1, min(24, int(_SPAN // max(nbytes, 1)) + 1))


def turns(positions: Tensor) -> Tensor:
    """Rotations of positions."""
    freqs = 10000.0 ** -(torch.arange(0, ROTARY, 2, device=DEVICE) / ROTARY)
    angles = positions.float().unsqueeze(-1) * freqs
    return torch.polar(torch.ones_like(angles), angles)


def draw(*shape: int) -> Tensor:
    """Random bf16."""
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def listed(n: int, total: int, picks: int) -> Tensor:
    """`picks` ascending rows of each sequence's own `total`."""
    scores = torch.rand(n, total, device=DEVICE)
    chosen = scores.topk(picks, -1).indices.sort(-1).values
    return chosen + total * torch.arange(n, device=DEVICE).unsqueeze(-1)


def decode_inputs(size: Size, n: int, entries: int, hca: bool) -> tuple[object, ...]:
    """One set: `entries` are all that HCA sees, or those that CSA picks from 4 times as many."""
    seen = torch.full((n,), entries, device=DEVICE, dtype=torch.int32)
    if hca:
        table = torch.randperm(n * entries, device=DEVICE).view(n, entries).int()
        some = Entries(draw(n * entries, DIMS), seen, table_SB=table)
    else:
        rows = listed(n, 4 * entries, entries)
        some = Entries(draw(4 * n * entries, DIMS), seen, rows_NK=rows)
    at = torch.full((n,), 16383, device=DEVICE) + torch.arange(n, device=DEVICE)
    slots = torch.randperm(n, device=DEVICE)
    sink = torch.randn(size.heads, device=DEVICE)
    return draw(n, size.heads, DIMS), draw(n, WINDOW, DIMS), slots, at, some, sink, turns(at)


def peers(calls: Sequence[Callable[[], object]], wanted: bool) -> float | None:
    """Seconds of a torch form, where it fits."""
    if not wanted:
        return None
    try:
        return gpu.timed(calls, repeats=5)
    except (RuntimeError, torch.cuda.OutOfMemoryError):
        torch.cuda.synchronize()
        return None


def decode_row(size: Size, n: int, entries: int, hca: bool, peer: bool = False) -> gpu.Row:
    """One line of the table."""
    keys = n * (WINDOW + entries)
    nbytes = keys * DIMS * 2 + 2 * n * size.heads * DIMS * 2
    inputs = [decode_inputs(size, n, entries, hca) for _ in range(sets(nbytes))]
    seconds = gpu.timed([lambda a=a: decode_attention(*a) for a in inputs])
    eager = peers([lambda a=a: decode_attention.reference(*a) for a in inputs[:3]], peer)
    kind = "hca" if hca else "csa"
    return gpu.Row(
        "decode_attention",
        f"{size.name} {kind} {entries} entries N={n}",
        seconds,
        nbytes,
        4 * keys * size.heads * DIMS,
        (("eager", eager),) if eager else (),
    )


def prefill_row(size: Size, t: int, entries: int, hca: bool) -> gpu.Row:
    """A chunk of one sequence whose last query stands behind `4 * entries` (or 128 times) tokens."""
    total = entries if hca else 4 * entries
    positions = total * (128 if hca else 4) - t + torch.arange(t, device=DEVICE)
    pool = draw(total, DIMS)
    seen = torch.full((t,), entries, device=DEVICE, dtype=torch.int32)
    if hca:
        table = torch.randperm(total, device=DEVICE).view(1, -1).int()
        some = Entries(pool, seen, table_SB=table)
    else:
        some = Entries(pool, seen, rows_NK=listed(1, total, entries).repeat(t, 1))
        some.rows_NK[:] = torch.rand(t, total, device=DEVICE).topk(entries).indices.sort().values
    zero = torch.zeros(t, dtype=torch.int64, device=DEVICE)
    q, new, rings = draw(t, size.heads, DIMS), draw(t, DIMS), draw(1, WINDOW, DIMS)
    sink, turn = torch.randn(size.heads, device=DEVICE), turns(positions)
    args = (q, new, rings, zero, positions, zero + positions[0], some, zero, sink, turn)
    seconds = gpu.timed([lambda: prefill_attention(*args)], repeats=10)
    keys = t * (WINDOW + entries)
    nbytes = pool.nbytes + 2 * q.nbytes + new.nbytes
    kind = "hca" if hca else "csa"
    name = f"{size.name} {kind} {entries} entries T={t}"
    return gpu.Row("prefill_attention", name, seconds, nbytes, 4 * keys * size.heads * DIMS)


def index_inputs(kind: KeyFormat, n: int, e: int, per: int = 32) -> tuple[object, ...]:
    """One set of queries and keys."""
    blocks = n * e // per
    if kind == "rows":
        keys = draw(blocks * per, 128)
    else:
        keys = torch.randint(0, 255, (blocks, per * (68 if kind == "fp4" else 132)), device=DEVICE)
        keys = keys.to(torch.uint8)
        if kind == "fp4":
            keys[:, per * 64 :] = 120 + keys[:, per * 64 :] % 8
        else:
            keys[:, : per * 128] &= 0xF7
            keys[:, per * 128 :] = torch.ones(1, device=DEVICE).view(torch.uint8).repeat(per)
    table = torch.randperm(blocks, device=DEVICE).view(n, -1).int()
    seen = torch.full((n,), e, device=DEVICE)
    gate = torch.randn(n, 64, device=DEVICE)
    return draw(n, 64, 128), gate, keys, kind, per, table, None, seen


def index_row(kind: KeyFormat, n: int, e: int) -> gpu.Row:
    """One line: every key read once, one score an entry written."""
    inputs = [index_inputs(kind, n, e) for _ in range(4)]
    width = {"rows": 256, "fp4": 68, "fp8": 132}[kind]
    seconds = gpu.timed([lambda a=a: index_scores(*a) for a in inputs])
    eager = None
    if kind == "rows":

        def product(q: Tensor, gate: Tensor, keys: Tensor) -> Tensor:
            raw = (q @ keys.view(len(q), -1, 128).mT).relu().float()
            return (raw * gate.unsqueeze(-1)).sum(1)

        eager = peers([lambda a=a: product(*a[:3]) for a in inputs], True)
    return gpu.Row(
        "index_scores",
        f"{kind} {e} entries N={n}",
        seconds,
        n * e * (width + 4),
        2 * n * e * 64 * 128,
        (("eager, no table", eager),) if eager else (),
    )


def select_row(n: int, e: int, count: int) -> gpu.Row:
    """One line; scores as ReLU leaves them would tie more."""
    inputs = [torch.randn(n, e, device=DEVICE) for _ in range(sets(n * e * 4))]
    seconds = gpu.timed([lambda a=a: select(a, count) for a in inputs])
    top = gpu.timed([lambda a=a: a.topk(count, -1) for a in inputs])
    name = f"{count} of {e} N={n}"
    return gpu.Row("select", name, seconds, n * e * 4, 0, (("torch.topk alone", top),))


def rows(quick: bool = False) -> list[gpu.Row]:
    """All lines of the table."""
    out = [select_row(1, 262_144, 512), select_row(1, 262_144, 1024), select_row(64, 4096, 512)]
    kinds: tuple[KeyFormat, ...] = ("rows", "fp8", "fp4")
    out += [index_row(kind, 1, 262_144) for kind in kinds]
    out += [index_row(kind, 64, 4096) for kind in kinds]
    for size in (FLASH, PRO):
        for n in (64,) if quick else (1, 16, 64, 128, 256, 512):
            out.append(decode_row(size, n, size.picks, hca=False, peer=n <= 128))
        for n in (64,) if quick else (1, 64):
            out += [decode_row(size, n, entries, hca=True) for entries in (128, 2048)]
        out.append(prefill_row(size, 2048, size.picks, hca=False))
        out.append(prefill_row(size, 2048, 128, hca=True))
    return out


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    copy, matrix = gpu.copy_rate(), gpu.matrix_rate()
    print(heading(" ".join(["python", *sys.argv])))
    print(f"\nCopy {copy / 1e9:.0f} GB/s, product {matrix / 1e12:.0f} TFLOP/s.\n")
    print(gpu.table(rows("quick" in sys.argv), copy, matrix))


if __name__ == "__main__":
    main()
