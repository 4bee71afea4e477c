"""On one CUDA device: a row's bits depend neither on its company nor on the tiles chosen for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whalepod.kernels import fp4_experts as experts_file
from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.fp4_experts import fp4_experts
from whalepod.kernels.fp8_linear import fp8_linear, pack
from whalepod.kernels.gate import gate
from whalepod.kernels.linear import linear_wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# Around every border between tiles, and far beyond the last.
COUNTS = (1, 2, 15, 16, 17, 33, 64, 65, 127, 128, 129, 300, 767, 768, 769, 2400, 5000)
MOST, WIDTH, K = 5000, 4096, 6
Numbers = torch.Generator


@pytest.fixture
def numbers() -> Numbers:
    return torch.Generator("cuda").manual_seed(5)


def drawn(numbers: Numbers, *shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=numbers).bfloat16()


def same_for_every_count(work: Callable[[int], Tensor]) -> None:
    """Several times: a race shows now and then."""
    all_rows = work(MOST)
    other = {n: sum(int((work(n) != all_rows[:n]).sum()) for _ in range(5)) for n in COUNTS}
    assert not any(other.values()), f"numbers that differ, by rows: {other}"


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("outputs", "columns", "groups"), [(1536, WIDTH, 1), (1024, 4096, 8), (192, 1024, 1)])  # fmt: skip
def test_fp8_products(
    outputs: int, columns: int, groups: int, released: bool, numbers: Numbers
) -> None:
    x = drawn(numbers, MOST, groups * columns)
    codes = drawn(numbers, groups * outputs, columns).to(torch.float8_e4m3fn)
    scale = torch.full((-(-groups * outputs // 128), columns // 128), 0.25, device="cuda")
    matrix = pack(codes, scale, groups)
    same_for_every_count(lambda n: fp8_linear(x[:n], matrix, released))


@pytest.mark.parametrize("outputs", [128, 2048, 16160])
def test_wide_products(outputs: int, numbers: Numbers) -> None:
    x, w = drawn(numbers, MOST, WIDTH), drawn(numbers, outputs, WIDTH)
    same_for_every_count(lambda n: linear_wide(x[:n], w))


def test_the_gate(numbers: Numbers) -> None:
    x, w = drawn(numbers, MOST, WIDTH), drawn(numbers, 256, WIDTH)
    bias = torch.randn(256, device="cuda", generator=numbers)
    same_for_every_count(lambda n: gate(x[:n], w, K, 1.5, bias)[1])


class Experts:
    """All 256 experts of one layer, or the first of them, with random bits."""

    def __init__(self, numbers: Numbers, held: int, width: int = 1024, inner: int = 512) -> None:
        self.slots = torch.full((256,), -1, dtype=torch.int32, device="cuda")
        self.slots[:held] = torch.arange(held, dtype=torch.int32)
        self.w13 = self._stack(numbers, held, 2 * inner, width)
        self.w2 = self._stack(numbers, held, width, inner)
        self.x = drawn(numbers, MOST, width)
        chances = torch.rand(MOST, 256, device="cuda", generator=numbers)
        self.ids = chances.topk(K, dim=1).indices
        self.weights = torch.rand(MOST, K, device="cuda", generator=numbers)

    def _stack(self, numbers: Numbers, held: int, rows: int, columns: int) -> Fp4Stack:
        blocks = columns // 128
        codes = torch.empty(held, blocks, rows, 32, dtype=torch.int16, device="cuda")
        scales = torch.full((held, blocks, rows, 4), 245, device="cuda").to(torch.uint8)
        return Fp4Stack(
            codes.random_(-32768, 32767, generator=numbers),
            scales.view(torch.int32).squeeze(-1),
            torch.ones(held, device="cuda"),
            columns,
        )

    def run(self, rows: int) -> Tensor:
        ids, weights = self.ids[:rows], self.weights[:rows]
        return fp4_experts(self.x[:rows], ids, weights, self.slots, self.w13, self.w2, 10.0)


@pytest.mark.parametrize("held", [256, 64, 3])
def test_experts(held: int, numbers: Numbers) -> None:
    experts = Experts(numbers, held)
    same_for_every_count(experts.run)


@pytest.mark.parametrize("held", [256, 100])
def test_crowded_experts(held: int, numbers: Numbers) -> None:
    """Most tokens choose the same few, of which some may not be held, the others spread."""
    experts = Experts(numbers, held)
    chances = torch.rand(MOST, 256, device="cuda", generator=numbers)
    chances[:, 90:110] += torch.rand(MOST, 1, device="cuda", generator=numbers)
    experts.ids = chances.topk(K, dim=1).indices
    same_for_every_count(experts.run)


def test_every_tile_of_experts(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, made = Experts(numbers, 128), {}
    for tiles in (experts_file._FEW, *(t for _, t in experts_file._TILES)):
        monkeypatch.setattr(experts_file, "tiles_of", lambda *_, tiles=tiles: tiles)
        made[tiles] = experts.run(1200)
    first = next(iter(made.values()))
    other = {t: int((out != first).sum()) for t, out in made.items()}
    assert not any(other.values()), f"numbers that differ, by tiles: {other}"
