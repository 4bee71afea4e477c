"""Rows out of messages for a shard and outputs into those home: written out, and by every twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from twins import DEVICE, random, twin

from whalepod.engine.fixed_form import FixedForm, where
from whalepod.kernels.hand_back import COLUMNS, hand_back, take_in

# Rows of each home in the order of arrival, their ranks, width, experts per token, shards.
CASES = [
    ([1], [0], 128, 6, 1),
    ([3, 1, 4], [2, 0, 1], 40, 2, 3),
    ([17, 48], [1, 0], 1032, 6, 4),
    ([5], [3], 24, 3, 8),
]
KINDS = [torch.float32, torch.bfloat16]
Case = tuple[list[int], list[int], int, int, int]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_parts_of_a_message_fill_it(dtype: torch.dtype, wide: bool) -> None:
    form = FixedForm(width=24, dtype=dtype, k=3, shards=2)
    message = torch.zeros(2, form.to_shard(5), dtype=torch.uint8)
    parts = form.split(message, 5, (5, 3), (5, 3))
    back = torch.zeros(form.to_home(5, wide), dtype=torch.uint8)
    home = form.split(back, form.room(5, wide), (15, 1))
    assert [tuple(p.shape) for p in home] == [(form.room(5, wide), 24), (15, 1), (4,)]
    for part in (*parts, *home):
        part.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).fill_(-1)
    for whole in (*message, back):
        assert len(whole) % 64 == 0
        assert int((whole == 255).sum()) == int(whole.nonzero().max()) + 1 > len(whole) - 64


class Given:
    """Messages of all homes at one shard, and what they hold."""

    def __init__(self, case: Case, kind: torch.dtype) -> None:
        counts, ranks, width, k, shards = case
        self.form, self.arrivals = (
            FixedForm(width, kind, k, shards),
            list(zip(ranks, counts, strict=True)),
        )
        total = sum(counts)
        self.x = random(total, width).to(kind)
        chosen = torch.randint(9, (total, k), dtype=torch.int32)
        self.ids = torch.where(torch.rand(total, k) < 1.5 / shards, chosen, -1).to(DEVICE)
        self.bits = torch.randint(1 << 30, (total, k), dtype=torch.int32).to(DEVICE)
        self.seals = torch.randint(1 << 30, (len(counts), 4), dtype=torch.int32).to(DEVICE)
        sizes = [self.form.to_shard(n) for n in counts]
        self.came = torch.full((sum(sizes),), 255, dtype=torch.uint8, device=DEVICE)
        row = 0
        for i, (message, n) in enumerate(zip(self.came.split(sizes), counts, strict=True)):
            x, ids, bits, seal = self.form.split(message, n, (n, k), (n, k))
            part = slice(row, row + n)
            x.copy_(self.x[part])
            ids.copy_(self.ids[part])
            bits.copy_(self.bits[part])
            seal.copy_(self.seals[i])
            row += n

    def table(self, wide: bool) -> Tensor:
        lines = where(self.form, self.arrivals, wide)
        return torch.tensor(lines, dtype=torch.int64).view(-1, COLUMNS).to(DEVICE)


def check_in(run: object, case: Case, kind: torch.dtype) -> None:
    some = Given(case, kind)
    found = run(some.came, some.table(False), some.form.width, some.form.k, kind)  # type: ignore[operator]
    for got, want in zip(found, (some.x, some.ids, some.bits), strict=True):
        assert torch.equal(got, want)


def check_back(run: object, case: Case, kind: torch.dtype, wide: bool) -> None:
    some = Given(case, kind)
    form, k = some.form, some.form.k
    out = random(len(some.x), k, form.width).to(kind)
    sizes = {home: form.to_home(n, wide) for home, n in sorted(some.arrivals)}
    data = torch.full((sum(sizes.values()),), 255, dtype=torch.uint8, device=DEVICE)
    run(some.came, some.table(wide), some.ids, out, data)  # type: ignore[operator]
    messages, row = dict(zip(sizes, data.split([*sizes.values()]), strict=True)), 0
    for i, (home, n) in enumerate(some.arrivals):
        room, used = form.room(n, wide), 0
        back, places, seal = form.split(messages[home], room, (n, k))
        for t in range(n):
            for choice in range(k):
                held = int(some.ids[row + t, choice]) >= 0
                assert int(places[t, choice]) == (used if held else -1)
                if held and used < room:
                    assert torch.equal(back[used], out[row + t, choice])
                used += held
        assert torch.equal(seal, some.seals[i])
        left = back[used:].contiguous().view(torch.uint8)
        assert (left == 255).all(), "nothing is written behind the last output"
        row += n


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_together(case: Case, kind: torch.dtype) -> None:
    check_in(take_in.reference, case, kind)


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_brings_them_together(case: Case, kind: torch.dtype) -> None:
    check_in(twin(take_in), case, kind)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_outputs_go_home(case: Case, kind: torch.dtype, wide: bool) -> None:
    check_back(hand_back.reference, case, kind, wide)


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_twin_sends_them_home(case: Case, kind: torch.dtype, wide: bool) -> None:
    check_back(twin(hand_back), case, kind, wide)


@pytest.mark.triton
@pytest.mark.parametrize("pick", [lambda kernel: kernel.reference, twin])
def test_more_outputs_than_room(pick: Callable[[object], object]) -> None:
    run, some = pick(hand_back), Given(([40], [0], 64, 6, 8), torch.float32)
    some.ids.clamp_(min=0)  # all of them are here
    room = some.form.room(40, False)
    assert room < 240
    data = torch.zeros(some.form.to_home(40, False), dtype=torch.uint8, device=DEVICE)
    out = random(40, 6, 64)
    run(some.came, some.table(False), some.ids, out, data)  # type: ignore[operator]
    back, places, _ = some.form.split(data, room, (240, 1))
    assert torch.equal(back, out.view(240, 64)[:room])
    assert places.flatten().tolist() == list(range(240)), "home reads from them what is missing"
