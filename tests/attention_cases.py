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


def packed(pages: int, per: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random packed pages, and the bf16 rows that are in them."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    count, plain = pages * per, dims - ROTARY
    codes = torch.randint(0, 256, (count, plain), generator=g, device=DEVICE).to(torch.uint8)
    codes[(codes & 127) == 127] = 0  # no NaN
    scales = torch.randint(110, 122, (count, 8), generator=g, device=DEVICE).to(torch.uint8)
    tail = torch.randn(count, ROTARY, generator=g, device=DEVICE).to(torch.bfloat16)
    data = torch.cat([codes, tail.view(torch.uint8)], dim=1).reshape(pages, -1)
    factor = torch.exp2(scales[:, : plain // 64].float() - 127).repeat_interleave(64, dim=1)
    values = (codes.view(torch.float8_e4m3fn).float() * factor).to(torch.bfloat16)
    spare = torch.full((pages, 24), 255, dtype=torch.uint8, device=DEVICE)
    storage = torch.cat([data, scales.reshape(pages, -1), spare], dim=1)
    return storage, torch.cat([values, tail], dim=1)
