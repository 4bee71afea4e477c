"""Packed pages read back: the reference from the format's definition, the twin exactly so."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, packed

from whalepod.kernels.jit import triton
from whalepod.kernels.unpack import entry_bytes, unpack


@pytest.mark.parametrize(("dims", "per"), [(128, 1), (128, 128), (512, 32)])
def test_what_was_packed_comes_back(dims: int, per: int) -> None:
    pages, values = packed(3, per, dims, seed=dims + per)
    assert pages.shape[1] >= per * entry_bytes(dims)
    rows = torch.randperm(3 * per, device=DEVICE)[:3].view(1, -1)
    assert torch.equal(unpack.reference(pages, dims, per, rows, False)[0], values[rows[0]])
    table = torch.tensor([[2, 0]], device=DEVICE)
    whole = unpack.reference(pages, dims, per, table, True)[0].view(2, per, dims)
    assert torch.equal(whole, values.view(3, per, dims)[[2, 0]])


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize(("dims", "per"), [(128, 1), (128, 32), (512, 32)])
def test_the_twin_reads_the_same(dims: int, per: int) -> None:
    pages, _ = packed(4, per, dims, seed=per)
    rows = torch.randint(0, 4 * per, (2, 19), device=DEVICE)
    counts = torch.tensor([19, 17], dtype=torch.int32, device=DEVICE)
    rows[1, 17:] = 10**9
    got, want = (f(pages, dims, per, rows, False, counts) for f in (unpack, unpack.reference))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :17], want[1, :17])
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(
        unpack(pages, dims, per, table, True), unpack.reference(pages, dims, per, table, True)
    )
