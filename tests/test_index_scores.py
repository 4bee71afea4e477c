"""Index scores over pages: the twin equals the definition for every format of keys."""

from __future__ import annotations

import pytest
import torch

from whalepod.kernels.index_scores import KeyFormat, index_scores, unpack_keys
from whalepod.kernels.jit import triton
from whalepod.model.quant import encode_fp4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
KINDS: list[KeyFormat] = ["rows", "fp4", "fp8"]


def packed(values: torch.Tensor, per: int, kind: KeyFormat) -> torch.Tensor:
    """`[pages * per, 128]` values as storage of a kind."""
    if kind == "rows":
        return values.to(DTYPE)
    pages = values.shape[0] // per
    if kind == "fp4":
        codes, scales = encode_fp4(values)
        data, tail = codes.view(torch.uint8), scales.view(torch.uint8)
    else:
        scale = values.abs().amax(-1, keepdim=True) / 448
        data = (values / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        tail = scale.contiguous().view(torch.uint8)
    return torch.cat([data.reshape(pages, -1), tail.reshape(pages, -1)], dim=1).contiguous()


def state(kind: KeyFormat, seen: list[int], per: int = 32, heads: int = 8) -> tuple:  # type: ignore[type-arg]
    g = torch.Generator(DEVICE).manual_seed(5)
    sequences = len(seen)
    width = max(1, -(-max(seen) // per)) + 1
    blocks = sequences * width + 2
    values = torch.randn(blocks * per, 128, generator=g, device=DEVICE)
    values *= torch.exp(torch.randn(len(values), 1, generator=g, device=DEVICE))
    keys = packed(values, per, kind)
    table = torch.randperm(blocks, generator=g, device=DEVICE)[: sequences * width]
    q = torch.randn(sequences, heads, 128, generator=g, device=DEVICE).to(DTYPE)
    wider = torch.randn(sequences, heads + 3, generator=g, device=DEVICE)
    gate = wider[:, 2:-1]  # as part of a product's columns
    own = torch.arange(sequences, device=DEVICE)
    counts = torch.tensor(seen, device=DEVICE)
    return q, gate, keys, kind, per, table.view(sequences, width).int(), own, counts, 0.3


def exactly(q, gate, keys, kind, per, table, sequences, seen, scale):  # type: ignore[no-untyped-def]
    wide = keys if kind == "rows" else unpack_keys(keys, per, kind)
    out = torch.full((len(q), table.shape[1] * per), float("-inf"), dtype=torch.float64)
    for t in range(len(q)):
        for e in range(int(seen[t])):
            row = int(table[sequences[t], e // per]) * per + e % per
            raw = (q[t].double() @ wide[row].double()).relu()
            out[t, e] = scale * float(gate[t].double() @ raw)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_definition(kind: KeyFormat) -> None:
    args = state(kind, [0, 33, 70])
    want, got = exactly(*args), index_scores.reference(*args).double().cpu()
    assert torch.equal(got == float("-inf"), want == float("-inf"))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_equals_the_reference(kind: KeyFormat) -> None:
    args = state(kind, [0, 1, 127, 128, 129, 1100])
    want, got = index_scores.reference(*args), index_scores(*args)
    assert torch.equal(got == float("-inf"), want == float("-inf"))
    real = want > float("-inf")
    assert (got[real] - want[real]).norm() < 2e-3 * want[real].norm()


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
def test_a_query_alone_has_the_same_bits() -> None:
    q, gate, keys, kind, per, table, own, seen, by = state("fp4", [300, 5, 40])
    together = index_scores(q, gate, keys, kind, per, table, own, seen, by)
    few = table[:, :10]
    alone = index_scores(q[:1], gate[:1], keys, kind, per, few, own[:1], seen[:1], by)
    assert torch.equal(alone[0], together[0, : alone.shape[1]])


def test_every_fp4_code_is_read() -> None:
    pages = torch.zeros(1, 68, dtype=torch.uint8)
    pages[0, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    pages[0, 64:] = torch.tensor([128, 127, 127, 127])
    want = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert unpack_keys(pages, 1, "fp4")[0, :16].tolist() == [
        2 * v for v in want + [-w for w in want]
    ]
