"""Random cache states for the attention kernels' tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.kernels.decode_attention import Entries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW, ROTARY = 128, 64


@dataclass
class Case:
    """One layer's state and `len(positions)` queries; poison lies wherever nothing may look."""

    q: Tensor
    rings: Tensor
    slots: Tensor
    positions: Tensor
    entries: Entries | None
    sink: Tensor
    turns: Tensor


def turns_of(positions: Tensor) -> Tensor:
    freqs = 10000.0 ** -(torch.arange(0, ROTARY, 2, device=positions.device) / ROTARY)
    angles = positions.float().unsqueeze(-1) * freqs
    return torch.polar(torch.ones_like(angles), angles)


def random_case(
    positions: list[int],
    seen: list[int] | None,
    *,
    heads: int = 4,
    dims: int = 128,
    listed: int = 0,
    per: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = DEVICE,
) -> Case:
    """Queries at `positions` that see `seen` entries: through a table, or `listed` rows."""
    g = torch.Generator(device).manual_seed(seed)
    n = len(positions)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    rings = draw(n + 2, WINDOW, dims)
    slots = torch.randperm(n + 2, generator=g, device=device)[:n]
    at = torch.tensor(positions, device=device)
    unused = torch.arange(WINDOW, device=device) > at.unsqueeze(-1)
    rings[slots] = rings[slots].masked_fill(unused.unsqueeze(-1), float("nan"))
    entries = None
    if seen is not None:
        most = max(*seen, 1)
        blocks = -(-most // per)
        table = torch.randperm(n * blocks + 3, generator=g, device=device)[: n * blocks]
        pool = draw((n * blocks + 3) * per, dims)
        used = torch.zeros(len(pool), dtype=torch.bool, device=device)
        rows = (table.view(n, -1, 1) * per + torch.arange(per, device=device)).flatten(1)
        for row, count in zip(rows, seen, strict=True):
            used[row[:count]] = True
        pool[~used] = float("nan")
        counts = torch.tensor(seen, dtype=torch.int32, device=device)
        if listed:
            picks = torch.full((n, listed), 10**6, device=device)
            for i, count in enumerate(seen):
                few = min(count, listed)
                chosen = torch.randperm(count, generator=g, device=device)[:few].sort().values
                picks[i, :few] = rows[i][chosen]
            entries = Entries(pool, counts.clamp(max=listed), rows_NK=picks)
        else:
            entries = Entries(pool, counts, table_SB=table.view(n, -1), per=per)
    sink = torch.randn(heads, generator=g, device=device)
    q = draw(n, heads, dims) * 2
    return Case(q, rings, slots, at, entries, sink, turns_of(at))
