"""Compressor twins against the references, row by row and byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twins import DEVICE, GPU, error, random, same, twin

from whalepod.kernels.compress import Pooling, compress_chunk, compress_decode
from whalepod.kernels.entries import Pages, Rounding, Storage, put, round_entries

pytestmark = pytest.mark.triton

RATIOS, SLOTS, PER = [4, 128], 9, 8
# Width of an entry, rotated pairs and rounding of the compressors: main, indexer, small.
KINDS: list[tuple[int, int, Rounding]] = [(512, 32, "kv"), (128, 32, "index"), (48, 3, "none")]


def pooling(ratio: int, size: int, rounding: Rounding) -> Pooling:
    width = size * (2 if ratio == 4 else 1)
    return Pooling(random(ratio, width), random(size), ratio, 1e-6, torch.bfloat16, rounding)


def turns(positions: Tensor, pairs: int) -> Tensor:
    angles = positions.float().unsqueeze(-1) * torch.rand(pairs, device=DEVICE)
    return torch.polar(torch.ones_like(angles), angles)


def storages(size: int, rounding: Rounding, blocks: int) -> list[Storage]:
    dense = torch.full((blocks * PER, size), float("nan"), device=DEVICE).bfloat16()
    if rounding == "none":
        return [dense]
    data, scales = (576, 8) if rounding == "kv" else (64, 4)
    stride = -(-PER * (data + scales) // 576) * 576
    return [
        dense,
        Pages(torch.zeros(blocks, stride, dtype=torch.uint8, device=DEVICE), PER, data, scales),
    ]


def copy(storage: Storage) -> Storage:
    if isinstance(storage, Pages):
        return Pages(storage.bytes.clone(), storage.count, storage.data, storage.scales)
    return storage.clone()


def content(storage: Storage) -> Tensor:
    return storage.bytes if isinstance(storage, Pages) else storage


def check(made: Storage, want: Storage, unrounded: Tensor, rounding: Rounding, pairs: int) -> None:
    """`unrounded` is dense and the twin's too: what it is before the rounding, in the same rows."""
    written = torch.arange(len(unrounded), device=DEVICE)[~unrounded[:, 0].isnan()]
    if isinstance(made, Pages):
        again = Pages(torch.zeros_like(made.bytes), made.count, made.data, made.scales)
        put(again, written, unrounded[written], rounding, 2 * pairs)
        assert torch.equal(made.bytes, again.bytes)
        return
    assert isinstance(want, Tensor)
    assert torch.equal(made.isnan(), want.isnan())
    rounded = round_entries(unrounded[written], rounding, 2 * pairs)
    assert error(made[written], rounded) < (1e-6 if rounding != "index" else 0.02)
    if len(written):
        assert error(made.nan_to_num(), want.nan_to_num()) < (0.05 if rounding == "index" else 0.01)


@pytest.mark.parametrize(("size", "pairs", "rounding"), KINDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_decoding_rows_equal_the_reference(
    ratio: int, size: int, pairs: int, rounding: Rounding
) -> None:
    how, plain = pooling(ratio, size, rounding), pooling(ratio, size, "none")
    plain = Pooling(how.ape_JC, how.norm_D, ratio, how.eps, how.dtype, "none")
    positions = torch.tensor([0, ratio - 1, ratio, 3 * ratio - 1, 8 * ratio - 1], device=DEVICE)
    slots = torch.randperm(SLOTS, device=DEVICE)[: len(positions)]
    blocks = torch.randperm(10, device=DEVICE)[:5]
    rows = random(5, 4 * how.ape_JC.shape[1] + 16)[:, 16 : 16 + 2 * how.ape_JC.shape[1]]
    rows = rows.unflatten(1, (2, -1))
    raw = random(SLOTS, how.slots, *rows.shape[1:])
    angles = turns(positions // ratio * ratio, pairs)
    bare = storages(size, "none", 10)[0]
    twin(compress_decode)(rows, plain, raw.clone(), bare, slots, positions, blocks, PER, angles)
    for storage in storages(size, rounding, 10):
        made, want, ring, ring_want = copy(storage), copy(storage), raw.clone(), raw.clone()
        for kernel, into, rings in (
            (twin(compress_decode), made, ring),
            (compress_decode.reference, want, ring_want),
        ):
            kernel(rows, how, rings, into, slots, positions, blocks, PER, angles)
        assert torch.equal(ring, ring_want)
        check(made, want, bare, rounding, pairs)
        alone = copy(storage)
        at = slice(3, 4)
        twin(compress_decode)(
            rows[at], how, raw.clone(), alone, slots[at], positions[at], blocks[at], PER, angles[at]
        )
        row = int(blocks[3]) * PER + 2
        if not isinstance(made, Pages):
            assert same(alone[row], made[row])


def test_no_decoding_rows_are_nothing() -> None:
    how, raw = pooling(4, 128, "none"), random(2, 8, 2, 256)
    none, before = torch.zeros(0, dtype=torch.int64, device=DEVICE), raw.clone()
    entries = random(8, 128)
    twin(compress_decode)(raw[:0, 0], how, raw, entries, none, none, none, 4, turns(none, 32))
    assert torch.equal(raw, before)


@pytest.mark.parametrize(("size", "pairs", "rounding"), KINDS)
@pytest.mark.parametrize(
    ("ratio", "start", "count"),
    [(4, 0, 3), (4, 0, 9), (4, 6, 7), (4, 3, 1), (128, 0, 130), (128, 100, 28), (128, 300, 5)],
)
def test_chunks_equal_the_reference(
    ratio: int, start: int, count: int, size: int, pairs: int, rounding: Rounding
) -> None:
    how = pooling(ratio, size, rounding)
    plain = Pooling(how.ape_JC, how.norm_D, ratio, how.eps, how.dtype, "none")
    rows, raw = random(count, 2, how.ape_JC.shape[1]), random(how.slots, 2, how.ape_JC.shape[1])
    closed = (start + count) // ratio - start // ratio
    flat = torch.randperm(5 * PER, device=DEVICE)[:closed]
    angles = turns(torch.arange(closed, device=DEVICE) * ratio, pairs)
    bare = storages(size, "none", 5)[0]
    twin(compress_chunk)(rows.clone(), plain, raw, bare, start, flat, angles)
    for storage in storages(size, rounding, 5):
        made, want, biased, wanted = copy(storage), copy(storage), rows.clone(), rows.clone()
        before = raw.clone()
        twin(compress_chunk)(biased, how, raw, made, start, flat, angles)
        compress_chunk.reference(wanted, how, raw, want, start, flat, angles)
        assert torch.equal(biased, wanted)
        assert torch.equal(raw, before)
        check(made, want, bare, rounding, pairs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where it interprets
@pytest.mark.parametrize("rounding", ["none", "kv"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_nan_stays_one_and_spoils_its_own_windows(part: int, rounding: Rounding) -> None:
    """Of what is pooled (0) or weighs (1), in the first of three windows and so in the second."""
    how, size = pooling(4, 512, rounding), 512
    rows, raw = random(12, 2, 2 * size), random(how.slots, 2, 2 * size)
    rows[1, part] = float("nan")
    flat, angles = torch.arange(3, device=DEVICE), turns(torch.arange(3, device=DEVICE) * 4, 32)
    entries = storages(size, "none", 1)[0]
    twin(compress_chunk)(rows, how, raw, entries, 0, flat, angles)
    assert isinstance(entries, Tensor)
    assert bool(entries[:2].isnan().all())
    assert bool(entries[2].isfinite().all())


@pytest.mark.parametrize("ratio", RATIOS)
def test_decoding_and_chunks_make_the_same_entries(ratio: int) -> None:
    """However a sequence is cut, its entries are those of one chunk."""
    size, length = (512, 2 * ratio + 3) if GPU else (128, 2 * ratio + 1)
    how = pooling(ratio, size, "none")
    rows = random(length, 2, how.ape_JC.shape[1])
    raw = torch.zeros(1, how.slots, *rows.shape[1:], device=DEVICE)
    angles = turns(torch.arange(2, device=DEVICE) * ratio, 32)
    whole, steps = storages(size, "none", 2)[0], storages(size, "none", 2)[0]
    flat = torch.arange(2, device=DEVICE) + PER
    twin(compress_chunk)(rows.clone(), how, raw[0], whole, 0, flat, angles)
    head = rows[: ratio - 1].clone()
    twin(compress_chunk)(head, how, raw[0], steps, 0, flat[:0], angles[:0])
    raw[0, : ratio - 1] = head
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for t in range(ratio - 1, length):
        turn = angles[t // ratio][None] if t // ratio < 2 else angles[:1]
        twin(compress_decode)(rows[t][None], how, raw, steps, zero, zero + t, zero + 1, PER, turn)
    assert same(whole.nan_to_num(), steps.nan_to_num())
    assert int((~whole.isnan()).any(1).sum()) == 2
