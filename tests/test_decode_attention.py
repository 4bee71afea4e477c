"""Decode attention: the twin equals the reference, and rows do not depend on company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, WINDOW, Case, packed, random_case

from whalepod.kernels.decode_attention import Entries, decode_attention
from whalepod.kernels.decode_attention_triton import Tiles, _whole_pays
from whalepod.kernels.jit import triton

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LIMIT = 1e-2 if DEVICE == "cuda" else 2e-5


def run(case: Case, name: str) -> torch.Tensor:
    call = decode_attention.reference if name == "torch" else decode_attention
    return call(case.q, case.rings, case.slots, case.positions, case.entries, case.sink, case.turns)


def exactly(case: Case) -> torch.Tensor:
    """Softmax over every visible key in fp64, from the definition."""
    out = []
    for i, position in enumerate(case.positions.tolist()):
        keys = case.rings[case.slots[i], : position + 1]
        if case.entries is not None:
            values, real = case.entries.gathered(torch.arange(len(case.q), device=case.q.device))
            keys = torch.cat([keys, values[i][real[i]]])
        q, keys = case.q[i].double(), keys.double()
        z = torch.cat([case.sink.double().unsqueeze(-1), q @ keys.T * q.shape[-1] ** -0.5], -1)
        o = torch.softmax(z, -1)[:, 1:] @ keys
        pairs = torch.view_as_complex(o[:, -64:].unflatten(-1, (-1, 2)).contiguous())
        pairs = pairs * case.turns[i].to(torch.complex128).conj()
        out.append(torch.cat([o[:, :-64], torch.view_as_real(pairs).flatten(-2)], -1))
    return torch.stack(out)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def a_row(case: Case, i: int) -> Case:
    entries = case.entries
    if entries is not None:
        entries = Entries(
            entries.pool,
            entries.seen_N[i : i + 1],
            None if entries.rows_NK is None else entries.rows_NK[i : i + 1],
            None if entries.table_SB is None else entries.table_SB[i : i + 1],
            entries.per,
        )
    few = {n: getattr(case, n)[i : i + 1] for n in ("q", "slots", "positions", "turns")}
    return replace(case, entries=entries, **few)


SHAPES = {
    "window": ([0, 1, 63, 64, 127, 128, 300], None, 0),
    "table": ([0, 130, 500, 700, 900], [0, 1, 63, 64, 65], 0),
    "listed": ([40, 130, 500, 900], [0, 1, 40, 260], 40),
    "long": ([700, 2000], [3, 330], 0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_softmax_over_the_visible_keys(shape: str) -> None:
    positions, seen, listed = SHAPES[shape]
    case = random_case(positions, seen, listed=listed, dtype=torch.float64, device="cpu")
    case.sink = case.sink.double()
    assert distance(run(case, "torch"), exactly(case)) < 1e-6


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_equals_the_reference(shape: str) -> None:
    positions, seen, listed = SHAPES[shape]
    case = random_case(positions, seen, listed=listed, dtype=DTYPE, heads=6)
    assert distance(run(case, "triton"), exactly(case)) < LIMIT


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
def test_a_row_alone_has_the_same_bits() -> None:
    for shape in ("long", "listed"):
        positions, seen, listed = SHAPES[shape]
        case = random_case(positions, seen, listed=listed, dtype=DTYPE)
        together = run(case, "triton")
        for i in range(len(positions)):
            one = a_row(case, i)
            if one.entries is not None and one.entries.table_SB is not None:
                width = max(1, -(-seen[i] // one.entries.per))
                one.entries = replace(one.entries, table_SB=one.entries.table_SB[:, :width])
            assert torch.equal(run(one, "triton")[0], together[i])


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("shape", ["table", "listed", "long"])
def test_one_program_for_all_parts_has_the_bits_of_parts_apart(shape: str) -> None:
    positions, seen, listed = SHAPES[shape]
    case = random_case(positions, seen, listed=listed, dtype=DTYPE, heads=6)
    call = decode_attention.pick(DEVICE)
    given = case.q, case.rings, case.slots, case.positions, case.entries, case.sink, case.turns
    whole, apart = (call(*given, Tiles(split=2, whole=one)) for one in (True, False))  # type: ignore[call-arg]
    assert torch.equal(whole, apart)
    assert distance(whole, exactly(case)) < LIMIT


def test_many_queries_get_a_program_each() -> None:
    wanted = {(64, 2): False, (128, 2): True, (512, 2): True, (128, 4): True, (64, 7): False}
    assert {k: _whole_pays(*k, 132, 5) for k in wanted} == wanted


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("listed", [0, 16])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_packed_storage_has_the_bits_of_its_rows(name: str, listed: int) -> None:
    case = random_case([5, 130, 700], [1, 32, 70], listed=listed, per=32, dtype=torch.bfloat16)
    assert case.entries is not None
    pool, rows = packed(len(case.entries.pool) // 32, 32, 128, seed=1)
    rings, ring_rows = packed(len(case.rings), WINDOW, 128, seed=2)
    case.rings, case.entries = ring_rows.view(-1, WINDOW, 128), replace(case.entries, pool=rows)
    if DEVICE == "cpu":
        case.q = case.q.float()
        case.rings, case.entries = case.rings.float(), replace(case.entries, pool=rows.float())
    want = run(case, name)
    case.rings, case.entries = rings, replace(case.entries, pool=pool, per=32)
    assert torch.equal(run(case, name), want)
