"""Prefill attention: the bits of decoding, however the prompt is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, WINDOW, Case, random_case, turns_of

from whalepod.kernels.decode_attention import Entries, decode_attention
from whalepod.kernels.jit import triton
from whalepod.kernels.prefill_attention import prefill_attention

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LIMIT = 1e-2 if DEVICE == "cuda" else 2e-5


class Prompts:
    """Sequences of random keys; the queries asked of them, chunk by chunk or row by row."""

    def __init__(self, spans: list[tuple[int, int]], ratio: int, listed: int, seed: int) -> None:
        """Spans are first and stop position of each sequence's chunk."""
        self.spans, self.ratio = spans, ratio
        rows = [(s, p) for s, (first, stop) in enumerate(spans) for p in range(first, stop)]
        self.sequences = torch.tensor([s for s, _ in rows], device=DEVICE)
        self.positions = torch.tensor([p for _, p in rows], device=DEVICE)
        seen = [(stop) // ratio for _, stop in spans]
        self.case = random_case([0] * len(spans), seen, per=4, dtype=DTYPE, seed=seed)
        g = torch.Generator(DEVICE).manual_seed(seed + 1)
        longest = max(stop for _, stop in spans)
        shape = (len(spans), longest, self.case.q.shape[-1])
        self.keys = torch.randn(*shape, generator=g, device=DEVICE).to(DTYPE)
        heads = self.case.q.shape[1:]
        self.q = torch.randn(len(rows), *heads, generator=g, device=DEVICE).to(DTYPE) * 2
        self.seen = ((self.positions + 1) // ratio).int()
        self.listed = listed

    def ring_before(self, sequence: int, position: int) -> torch.Tensor:
        """The ring once every key before a position is in it; the rest is poison."""
        ring = torch.full_like(self.case.rings[0], float("nan"))
        for p in range(max(0, position - WINDOW), position):
            ring[p % WINDOW] = self.keys[sequence, p]
        return ring

    def entries(self, rows: slice, sequences: torch.Tensor, by_row: bool) -> Entries:
        some = self.case.entries
        assert some is not None
        assert some.table_SB is not None
        if self.listed:
            picks = torch.zeros(len(sequences), self.listed, dtype=torch.int64, device=DEVICE)
            every = Entries(some.pool, some.seen_N, table_SB=some.table_SB, per=some.per)
            for i, s in enumerate(sequences.tolist()):
                count = int(self.seen[rows][i])
                flat = every.table_SB[s].unsqueeze(-1) * some.per
                flat = (flat + torch.arange(some.per, device=DEVICE)).flatten()[:count]
                chosen = torch.randperm(
                    count, generator=torch.Generator().manual_seed(int(self.positions[rows][i]))
                )
                chosen = flat[chosen[: self.listed].sort().values.to(DEVICE)]
                picks[i, : len(chosen)] = chosen
            return Entries(some.pool, self.seen[rows].clamp(max=self.listed), rows_NK=picks)
        table = some.table_SB[sequences] if by_row else some.table_SB
        return Entries(some.pool, self.seen[rows], table_SB=table, per=some.per)

    def prefill(self, name: str) -> torch.Tensor:
        at, s = self.positions, self.sequences
        rings = torch.stack([self.ring_before(i, a) for i, (a, _) in enumerate(self.spans)])
        starts = torch.tensor([self.spans[i][0] for i in s.tolist()], device=DEVICE)
        call = prefill_attention.reference if name == "torch" else prefill_attention
        entries = self.entries(slice(None), s, by_row=False)
        new = self.keys[s, at]
        return call(self.q, new, rings, s, at, starts, entries, s, self.case.sink, turns_of(at))

    def decode(self, row: int, name: str) -> torch.Tensor:
        part = slice(row, row + 1)
        at, s = self.positions[part], self.sequences[part]
        ring = self.ring_before(int(s), int(at) + 1).unsqueeze(0)
        call = decode_attention.reference if name == "torch" else decode_attention
        case: Case = replace(self.case, entries=self.entries(part, s, by_row=True))
        zero = torch.zeros_like(s)
        return call(self.q[part], ring, zero, at, case.entries, case.sink, turns_of(at))[0]


SPANS = {"fresh": [(0, 5), (60, 70)], "laps": [(120, 135), (300, 303)], "long": [(1500, 1503)]}


@pytest.mark.parametrize("listed", [0, 16])
@pytest.mark.parametrize("spans", SPANS)
def test_the_reference_is_decoding_row_by_row(spans: str, listed: int) -> None:
    prompts = Prompts(SPANS[spans], 4, listed, seed=3)
    out = prompts.prefill("torch")
    for row in range(0, len(out), 3):
        assert torch.allclose(out[row], prompts.decode(row, "torch"), rtol=LIMIT, atol=LIMIT)


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("listed", [0, 16])
@pytest.mark.parametrize("spans", SPANS)
def test_the_twin_has_the_bits_of_decoding(spans: str, listed: int) -> None:
    prompts = Prompts(SPANS[spans], 4, listed, seed=4)
    out = prompts.prefill("triton")
    want = prompts.prefill("torch")
    assert float((out.double() - want.double()).norm() / want.double().norm()) < LIMIT
    for row in range(0, len(out), 4):
        assert torch.equal(out[row], prompts.decode(row, "triton"))
