"""Heads, window keys and their rings: the twins against the references, values and bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twins import DEVICE, GPU, error, poisoned, random, same, twin

from whalepod.kernels.entries import Pages, put, round_entries
from whalepod.kernels.rms_norm import rms_norm
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.window import window_rows

pytestmark = pytest.mark.triton

EPS, W = 1e-6, 128
COUNTS = [0, 1, 7, 8, 9, 300] if GPU else [0, 1, 9]
KINDS = [torch.bfloat16, torch.float32]
LIMIT = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


def turns(positions: Tensor, pairs: int) -> Tensor:
    angles = positions.float().unsqueeze(-1) * torch.rand(pairs, device=DEVICE)
    return torch.polar(torch.ones_like(angles), angles)


def kv_pages(pages: int, count: int) -> Pages:
    stride = -(-count * 584 // 576) * 576
    return Pages(torch.zeros(pages, stride, dtype=torch.uint8, device=DEVICE), count, 576, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7168, 4096, 1536, 512, 48] if GPU else [48, 512])
@pytest.mark.parametrize("rows", COUNTS)
def test_norm_equals_fp64(rows: int, size: int, kind: torch.dtype) -> None:
    x = random(rows, size + 16, kind=kind)[:, 16:]  # rows of a wider product
    for weight in (random(size), None):
        with poisoned():
            made = twin(rms_norm)(x, weight, EPS)
        wide = x.double()
        want = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        want = want if weight is None else want * weight.double()
        assert made.dtype == kind
        assert error(made, want) < LIMIT[kind]
        if rows:
            assert same(twin(rms_norm)(x[-1:], weight, EPS), made[-1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("tokens", COUNTS[:3])
def test_heads_equal_the_reference(tokens: int, heads: int, kind: torch.dtype) -> None:
    x = random(tokens, heads * 512 + 64, kind=kind)
    q = x[:, : heads * 512].unflatten(1, (heads, 512))
    table = turns(torch.arange(tokens, device=DEVICE) * 1000, 32)
    with poisoned():
        made = twin(norm_rotate)(q, None, table, EPS)
    want = norm_rotate.reference(q.double().float(), None, table, EPS)
    assert error(made, want) < LIMIT[kind]
    if tokens:
        assert same(twin(norm_rotate)(q[-1:], None, table[-1:], EPS), made[-1:])


@pytest.mark.parametrize("rounding", ["none", "kv"])
@pytest.mark.parametrize("size", [512, 48])
def test_window_rows_equal_the_reference(size: int, rounding: str) -> None:
    """Rounded keys may land on the neighbour on the FP8 grid, now and then, by one step."""
    tokens, count, pairs = 9, 5, size // 16
    x, norm = random(tokens, size + 32, kind=torch.bfloat16)[:, 32:], random(size)
    at = torch.randint(0, 100_000, (tokens,), device=DEVICE)
    slots, table = torch.randperm(7, device=DEVICE)[:count], turns(at, pairs)
    made_in, want_in = (torch.zeros(7, W, size, device=DEVICE).bfloat16() for _ in range(2))
    with poisoned():
        made = twin(window_rows)(x, norm, table, EPS, rounding, made_in, W, slots, at)
    want = window_rows.reference(x, norm, table, EPS, rounding, want_in, W, slots, at)
    assert error(made, want) < 4e-3
    assert torch.equal(made_in[slots, at[:count] % W], made[:count])
    assert error(made_in, want_in) < 4e-3
    assert int((made_in != 0).any(-1).sum()) == count
    alone = twin(window_rows)(x[3:4], norm, table[3:4], EPS, rounding)
    assert same(alone, made[3:4])


def test_window_bytes_are_what_the_layout_says() -> None:
    tokens, count = 6, 4
    x, norm = random(tokens, 512, kind=torch.bfloat16), random(512)
    at = torch.tensor([0, 127, 128, 77777, 5, 6], device=DEVICE)
    slots, table = torch.tensor([2, 0, 1, 4], device=DEVICE), turns(at, 32)
    pages, want = kv_pages(5, W), kv_pages(5, W)
    made = twin(window_rows)(x, norm, table, EPS, "kv", pages, W, slots, at)
    # Without the rounding the twin gives what it quantises, so the bytes have to be equal.
    plain = twin(window_rows)(x, norm, table, EPS, "none")
    put(want, slots * W + at[:count] % W, plain[:count], "kv", 64)
    assert torch.equal(pages.bytes, want.bytes)
    assert torch.equal(made, round_entries(plain, "kv", 64))
