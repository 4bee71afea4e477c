"""Read the strings out of an R lazy-load database (`.rdb`) without R.

Such a file is a row of blocks: a 4-byte big-endian length of the unpacked data, then zlib data, or
one type byte and bz2 or raw LZMA2 data. In a block a string is a flag word of type 9, a length and
the bytes.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHARSXP, _LONGEST = 9, 400
_LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


def blocks(path: Path) -> Iterator[bytes]:
    """Unpacked blocks, in order. Raises ValueError at one that no decoder understands."""
    data, at = path.read_bytes(), 0
    while at < len(data) - 5:
        raw, at = _unpack(data, at)
        yield raw


def _unpack(data: bytes, start: int) -> tuple[bytes, int]:
    length = struct.unpack(">I", data[start : start + 4])[0]
    decoders: list[tuple[int, Any]] = [
        (4, zlib.decompressobj()),
        (5, bz2.BZ2Decompressor()),
        (5, lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA2)),
    ]
    for offset, decoder in decoders:
        try:
            raw = decoder.decompress(data[start + offset :])
        except (zlib.error, OSError, lzma.LZMAError, EOFError):
            continue
        if len(raw) == length:
            return raw, len(data) - len(decoder.unused_data)
    raise ValueError(f"block at byte {start} is neither zlib, bz2 nor LZMA2 of {length} bytes")


def strings(raw: bytes) -> list[str]:
    """All character strings of a serialised R object, found by scanning."""
    found, at = [], 0
    while at < len(raw) - 8:
        flags, length = struct.unpack(">Ii", raw[at : at + 8])
        fits = 0 <= length <= _LONGEST and at + 8 + length <= len(raw)
        if flags & 0xFF == _CHARSXP and flags < 0x100000 and fits:
            found.append(raw[at + 8 : at + 8 + length].decode("utf8", "replace"))
            at += 8 + length
        else:
            at += 1
    return found
