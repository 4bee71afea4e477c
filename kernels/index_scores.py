"""Scores of the indexer over keys where they lie in pages.

Legend: T queries, H index heads, I index_head_dim, E entries, S sequences, B blocks of a table.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.entries import Pages
from whalepod.kernels.registry import Kernel

# Of packed keys: bytes of an entry's data and of its scales, for 128 dims.
KeyFormat = Literal["rows", "fp4", "fp8"]
SIZES = {"fp4": (64, 4), "fp8": (128, 4)}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_keys(pages: Tensor, per: int, kind: KeyFormat) -> Tensor:
    """Keys of all pages, `[pages * per, 128]` fp32.

    Args:
        pages: `[pages, stride]` uint8: the data of `per` entries, then their scales.
        kind: `fp4`: E2M1, low nibble first, with 4 E8M0 scales of 32 dims. `fp8`: E4M3 with one
            fp32 scale.
    """
    data, scales = SIZES[kind]
    body = pages[:, : per * data].reshape(-1, data)
    tail = pages[:, per * data : per * (data + scales)].reshape(-1, scales)
    if kind == "fp8":
        wide: Tensor = body.contiguous().view(torch.float8_e4m3fn).float()
        scaled: Tensor = wide * tail.contiguous().view(torch.float32)
        return scaled
    codes = torch.stack([body & 15, body >> 4], dim=-1).flatten(1).long()
    values = torch.tensor([*_FP4, *(-v for v in _FP4)], device=pages.device)[codes]
    wide = values.unflatten(1, (4, 32)) * torch.exp2(tail.float() - 127).unsqueeze(-1)
    return wide.flatten(1)


def read_keys(storage: Tensor | Pages, rows: Tensor) -> Tensor:
    """Keys of flat rows, `[..., I]`: as they lie, or widened to fp32 from pages in FP4.

    Args:
        rows: int64, any shape.
    """
    if not isinstance(storage, Pages):
        return F.embedding(rows, storage)
    flat, per, (data, scales) = rows.flatten(), storage.count, SIZES["fp4"]
    page, place = (flat // per).unsqueeze(-1), (flat % per).unsqueeze(-1)
    lane = torch.arange(data, device=rows.device)
    body = storage.bytes[page, place * data + lane]
    tail = storage.bytes[page, per * data + place * scales + lane[:scales]]
    return unpack_keys(torch.cat([body, tail], 1), 1, "fp4").view(*rows.shape, -1)


@Kernel
def index_scores(
    q_THI: Tensor,
    gate_TH: Tensor,
    keys: Tensor,
    kind: KeyFormat,
    per: int,
    table_SB: Tensor,
    sequences_T: Tensor | None,
    seen_T: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`sum_h scale * gate[t, h] * relu(q[t, h] . key[e])` for every entry that a query sees.

    Args:
        q_THI: `[T, H, I]`, fp32 or bf16.
        gate_TH: `[T, H]` fp32.
        keys: `[F, I]` rows, or `[pages, stride]` uint8 as `unpack_keys` says.
        kind: which of these.
        per: entries of a block.
        table_SB: `[S, B]` blocks of each sequence.
        sequences_T: `[T]` row of the table; None where query t has row t.
        seen_T: `[T]` how many entries each query sees.
        scale: of the gate, rounded to fp32 with it.

    Returns:
        `[T, B * per]` fp32; -inf where a query does not see. A score depends on nothing but its
        query and its key.
    """
    if kind != "rows":
        used = torch.unique(table_SB)
        wide = torch.zeros(keys.shape[0], per, q_THI.shape[-1], device=keys.device)
        wide[used] = unpack_keys(keys[used], per, kind).view(len(used), per, -1)
        keys = wide.flatten(0, 1)
    inside = torch.arange(per, device=keys.device)
    rows = (table_SB.long().unsqueeze(-1) * per + inside).flatten(1)
    out = torch.empty(len(q_THI), rows.shape[1], dtype=torch.float32, device=keys.device)
    order = torch.arange(rows.shape[1], device=keys.device)
    owners = range(len(q_THI)) if sequences_T is None else sequences_T.tolist()
    for i, s in enumerate(owners):
        raw = (q_THI[i].float() @ keys[rows[s]].float().T).relu()
        out[i] = (gate_TH[i].float() * scale) @ raw
    return out.masked_fill_(order >= seen_T.unsqueeze(-1), float("-inf"))


from whalepod.kernels import index_scores_triton  # noqa: E402, F401  (registers its twin)
