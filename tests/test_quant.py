"""Number formats against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.model import quant

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(code: int) -> float:
    """Value of an E4M3FN code, from its bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


FP8 = sorted({abs(e4m3(c)) for c in range(128) if not math.isnan(e4m3(c))})


def nearest_even(x: float, values: list[float]) -> float:
    """Nearest representable value, ties to the one with the even index."""
    magnitude = min(abs(x), values[-1])
    best = min(range(len(values)), key=lambda i: (abs(values[i] - magnitude), i % 2))
    return math.copysign(values[best], x)


def power_above(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def test_e8m0_bytes() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    got = quant.decode_e8m0(codes.view(torch.float8_e8m0fnu)).tolist()
    assert got == [2.0 ** (b - 127) for b in range(255)]
    with pytest.raises(ValueError, match="255"):
        quant.decode_e8m0(torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu))


def test_values_that_are_not_finite_are_counted() -> None:
    for code in range(256):
        stored = torch.tensor([[0, code, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert quant.how_many_spoilt(stored) == math.isnan(e4m3(code)), code
    for kind in (torch.float32, torch.bfloat16):
        values = torch.linspace(-1e38, 1e38, 1001).to(kind)
        assert quant.how_many_spoilt(values) == 0
        values[[0, 500, 1000]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=kind)
        assert quant.how_many_spoilt(values.view(7, 143)) == 3
        assert quant.how_many_spoilt(values[1:500]) == 0
        assert quant.how_many_spoilt(values[:0]) == 0
    assert quant.how_many_spoilt(torch.tensor([-1, 127], dtype=torch.int8)) == 0


def test_every_fp8_code_with_a_cut_off_tile() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(130, 1)
    codes[:, [0x7F, 0xFF]] = 0
    scale = torch.tensor([[127, 130], [120, 127]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = quant.decode_fp8(codes.view(torch.float8_e4m3fn), scale)
    for row in (0, 127, 128, 129):
        for column in (0, 1, 100, 127, 128, 254):
            factor = [[1.0, 8.0], [2.0**-7, 1.0]][row // 128][column // 128]
            assert got[row, column].item() == e4m3(int(codes[row, column])) * factor


def test_fp4_low_nibble_is_the_even_column() -> None:
    packed = torch.tensor([list(range(16))], dtype=torch.uint8)
    packed = packed | ((15 - packed) << 4)
    scale = torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = quant.decode_fp4(packed.view(torch.int8), scale)[0].tolist()
    table = FP4 + [-v for v in FP4]
    expected = [2.0 * table[n] for b in range(16) for n in (b, 15 - b)]
    assert got == expected


@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (5, 40)])
def test_fp8_round_trip_is_the_nearest_value(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    value = torch.randn(shape) * torch.logspace(-3, 2, shape[1])
    codes, scale = quant.encode_fp8(value)
    assert codes.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    got = quant.decode_fp8(codes, scale)
    grid = quant.decode_e8m0(scale)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, 17)]:
        tile = value[row // 128 * 128 :, column // 128 * 128 :][:128, :128]
        factor = power_above(tile.abs().max().item() / 448)
        assert grid[row // 128, column // 128].item() == factor
        expected = factor * nearest_even(value[row, column].item() / factor, FP8)
        assert got[row, column].item() == pytest.approx(expected, rel=1e-6)


def test_fp4_round_trip_and_ties() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = [6.0, *ties, *(-t for t in ties), 0.0, -0.0, 0.1, 5.9] + [0.3] * 13
    assert len(row) == 32
    value = torch.tensor([row])
    got = quant.decode_fp4(*quant.encode_fp4(value))[0].tolist()
    assert got == [nearest_even(x, FP4) for x in row]


def fake(
    values: list[float], block: int, largest: float, floor: float, table: list[float]
) -> list[float]:
    out = []
    for start in range(0, len(values), block):
        group = values[start : start + block]
        amax = max(floor, *(abs(v) for v in group))
        reciprocal = torch.tensor(1.0 / largest, dtype=torch.float32)
        factor = power_above((torch.tensor(amax, dtype=torch.float32) * reciprocal).item())
        out += [factor * nearest_even(v / factor, table) for v in group]
    return out


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70))
def test_fake_fp8_equals_plain_python(values: list[float]) -> None:
    got = quant.fake_fp8(torch.tensor(values), 32).tolist()
    assert got == pytest.approx(fake(values, 32, 448.0, 1e-4, FP8), rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_fake_fp4_equals_plain_python(values: list[float]) -> None:
    got = quant.fake_fp4(torch.tensor(values)).tolist()
    expected = fake(values, 32, 6.0, 6 * 2.0**-126, FP4)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-37)


@pytest.mark.parametrize("exponent", [-20, -1, 0, 3, 17])
def test_exact_powers_are_not_bumped_up(exponent: int) -> None:
    x = torch.tensor([2.0**exponent])
    assert quant.power_of_two_above(x).item() == 2.0**exponent
    above = torch.nextafter(x, torch.tensor([math.inf]))
    assert quant.power_of_two_above(above).item() == 2.0 ** (exponent + 1)
