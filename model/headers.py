"""Safetensors headers: where each tensor lies, read without touching tensor data.

The whole checkpoint is checked from its headers before anything starts.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whalepod.errors import CheckpointError

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_LARGEST_HEADER = 512 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in one file: absolute byte offsets `start .. end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read one file's header. Raises CheckpointError if it is cut short or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(_LARGEST_HEADER, size):
                raise CheckpointError(
                    f"{path}: its {size} bytes do not begin with a safetensors header; "
                    "download the file again"
                )
            raw = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist, but {INDEX} names it; download the missing shard"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror} for user {os.getuid()}; change its owner or mode"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: its header is not JSON ({error}); download it again"
        ) from None
    raw.pop("__metadata__", None)
    return {name: _entry(path, name, item, 8 + length, size) for name, item in raw.items()}


def _entry(path: Path, name: str, item: dict[str, Any], base: int, size: int) -> Entry:
    dtype, shape = str(item["dtype"]), tuple(int(n) for n in item["shape"])
    start, end = (base + int(n) for n in item["data_offsets"])
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name} has the unknown dtype {dtype}; expected one of "
            f"{', '.join(ITEM_BYTES)}"
        )
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name} ends at byte {end}, the file at {size}; "
            "download it again"
        )
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name} of {dtype} {list(shape)} takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]} bytes, its offsets span {end - start}"
        )
    return Entry(path, dtype, shape, start, end)


def read_folder(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder, by name; the index and the shards must agree.

    Raises:
        CheckpointError: no weights, a missing shard, or a tensor that is not where the index says.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{folder} holds neither {INDEX} nor model.safetensors; name a checkpoint folder"
            )
        return read_header(single)
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index with a weight_map ({error!r})") from None
    found: dict[str, Entry] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a plain file name")
        found.update(read_header(folder / shard))
    for name, shard in placed.items():
        if name not in found or found[name].file.name != shard:
            where = found[name].file.name if name in found else "no shard"
            raise CheckpointError(
                f"{index}: tensor {name} should be in {shard}, but it is in {where}"
            )
    return found
