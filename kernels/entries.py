"""Cache entries: how they are rounded, and how they lie in memory.

Dense storage is `[F, D]`, one row an entry. Paged storage is `[pages, stride]` bytes: a page's data,
entry by entry, then its scales. A key/value entry has its leading dims in E4M3, one E8M0 scale for
64 of them, and its P rotated pairs in bf16; an indexer entry is packed E2M1 with a scale for 32.

Legend: X entries, D width, F entries that storage has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.hadamard import hadamard
from whalepod.kernels.quantise import (
    FP4_GROUP,
    FP4_MAX,
    FP8_MAX,
    fake_fp4,
    fake_fp8,
    fp4_codes,
    power_of_two_above,
)
from whalepod.kernels.registry import Kernel

KV_BLOCK = 64
Rounding = Literal["none", "kv", "index"]


@dataclass(frozen=True, slots=True)
class Pages:
    """Entries in bytes.

    Args:
        bytes: `[pages, stride]` uint8, last dim contiguous, stride a multiple of 2.
        count: entries of a page.
        data, scales: bytes of one entry's data and of its scales: 576 and 8 (7 and a pad) for
            key/value entries of 512 dims with 64 rotated, 64 and 4 for indexer entries of 128.
    """

    bytes: Tensor
    count: int
    data: int
    scales: int


Storage = Tensor | Pages


def round_entries(x: Tensor, rounding: Rounding, rotary: int) -> Tensor:
    """Round the last dim and back, the dtype kept.

    Args:
        x: `[..., D]`.
        rounding: `kv`: FP8 in blocks of 64, the last `rotary` dims untouched. `index`: Hadamard
            rotation, then FP4 in blocks of 32. `none`: as it is.
    """
    if rounding == "none":
        return x
    if rounding == "index":
        return fake_fp4(hadamard(x), FP4_GROUP)
    plain = x.shape[-1] - rotary
    return torch.cat([fake_fp8(x[..., :plain], KV_BLOCK), x[..., plain:]], dim=-1)


@Kernel
def round_rows(x: Tensor, rounding: Rounding, rotary: int = 0) -> Tensor:
    """`round_entries` for what is stored nowhere."""
    return round_entries(x, rounding, rotary)


def put(
    storage: Storage, rows_X: Tensor, entries_XD: Tensor, rounding: Rounding, rotary: int
) -> None:
    """Round entries and write them into flat rows of storage; those with a negative row are left out.

    Paged storage holds rounded entries: `rounding` is `kv` or `index`.
    """
    kept = rows_X >= 0
    rows_X, entries_XD = rows_X[kept], entries_XD[kept]
    if not isinstance(storage, Pages):
        storage[rows_X] = round_entries(entries_XD, rounding, rotary).to(storage.dtype)
        return
    if rounding == "index":
        data, scales = _index_bytes(hadamard(entries_XD))
    else:
        data, scales = _kv_bytes(entries_XD, rotary)
    page, place = (rows_X // storage.count).unsqueeze(-1), (rows_X % storage.count).unsqueeze(-1)
    within = torch.arange(storage.data, device=place.device)
    storage.bytes[page, place * storage.data + within] = data
    scales = F.pad(scales, (0, storage.scales - scales.shape[1]))
    behind = storage.count * storage.data + within[: storage.scales]
    storage.bytes[page, place * storage.scales + behind] = scales


def _kv_bytes(entries_XD: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    plain = entries_XD.shape[-1] - rotary
    padded = F.pad(entries_XD[:, :plain].float(), (0, -plain % KV_BLOCK))
    groups = padded.unflatten(-1, (-1, KV_BLOCK))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = power_of_two_above(amax * (1.0 / FP8_MAX))
    codes = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    tail = entries_XD[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat([codes.flatten(1)[:, :plain], tail], 1), _exponents(scale)


def _index_bytes(entries_XD: Tensor) -> tuple[Tensor, Tensor]:
    groups = entries_XD.float().unflatten(-1, (-1, FP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(FP4_MAX * 2.0**-126)
    scale = power_of_two_above(amax * (1.0 / FP4_MAX))
    scaled = (groups / scale).clamp(-FP4_MAX, FP4_MAX)
    codes = (fp4_codes(scaled) + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), _exponents(scale)


def _exponents(scale: Tensor) -> Tensor:
    """E8M0 bytes of powers of two `[X, groups, 1]`."""
    return (scale.squeeze(-1).contiguous().view(torch.int32) >> 23).to(torch.uint8)


from whalepod.kernels import entries_triton  # noqa: E402, F401  (registers a twin)
