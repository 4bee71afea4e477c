"""Activations in FP8: the same scales and codes as model/quant.py, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whalepod.kernels.act_quant import act_quant, round_fp8
from whalepod.kernels.jit import INTERPRETED
from whalepod.model.quant import fake_fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(0, 128), (1, 128), (3, 96), (4, 384), (5, 200)]
TWINS = [
    pytest.param(False, id="reference"),
    pytest.param(True, id="triton", marks=pytest.mark.triton),
]


def pick(kernel: Callable[..., object], twin: bool) -> Callable[..., object]:
    return kernel if twin else kernel.reference  # type: ignore[attr-defined]


def inputs(rows: int, columns: int, kind: torch.dtype) -> Tensor:
    """Rows of very different sizes; exact multiples of the largest code, ties, zeros."""
    x = torch.randn(rows, columns) * torch.logspace(-9, 4, max(rows, 1))[:rows, None]
    if rows > 3:
        x[1, :32] = 448 * 2.0**-3
        x[2, :100] = (torch.randint(-15, 16, (100,)) + 0.5) / 16
        x[3] = 0
    return x.to(DEVICE, kind)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_rounding_there_and_back_is_the_model_s(
    rows: int, columns: int, kind: torch.dtype, twin: bool
) -> None:
    x = inputs(rows, columns, kind)
    got = pick(round_fp8, twin)(x)
    assert isinstance(got, Tensor)
    assert got.dtype == kind
    assert torch.equal(got, fake_fp8(x, 128))


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_codes_and_scales_are_those_of_the_rounding(rows: int, columns: int, twin: bool) -> None:
    x = inputs(rows, columns, torch.float32)
    codes, scales = pick(act_quant, twin)(x)  # type: ignore[misc]
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == (rows, 128 * -(-columns // 128))
    value = (codes.float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)).flatten(1)
    assert torch.equal(value[:, :columns], fake_fp8(x, 128))
    assert not value[:, columns:].any()
    amax = torch.nn.functional.pad(x, (0, -columns % 128)).unflatten(1, (-1, 128)).abs().amax(-1)
    amax, scales = amax.cpu(), scales.cpu()  # a log2 on a GPU may miss a power of two
    want = torch.exp2(torch.ceil(torch.log2(amax.double().clamp_min(1e-4) / 448)))
    assert torch.equal(scales.double(), want)


@pytest.mark.parametrize("twin", TWINS)
def test_paired_codes_put_the_halves_of_a_block_side_by_side(twin: bool) -> None:
    x = inputs(4, 256, torch.bfloat16)
    flat, scales = pick(act_quant, twin)(x)  # type: ignore[misc]
    paired, same = pick(act_quant, twin)(x, paired=True)  # type: ignore[misc]
    assert torch.equal(scales, same)
    halves = paired.view(torch.uint8).view(4, 2, 64, 2)
    back = torch.stack([halves[..., 0], halves[..., 1]], 2).flatten(1)
    assert torch.equal(back, flat.view(torch.uint8))


@pytest.mark.parametrize("twin", TWINS)
def test_a_nan_stays_one_and_spoils_no_other_row(twin: bool) -> None:
    if twin and INTERPRETED:
        pytest.skip("the interpreter's conversion to FP8 makes a number of a NaN")
    x = inputs(4, 256, torch.float32)
    sound = pick(round_fp8, twin)(x)
    x[1, 130] = float("nan")
    spoilt = pick(round_fp8, twin)(x)
    assert bool(spoilt[1, 130].isnan())  # type: ignore[index]
    assert torch.equal(spoilt[[0, 2, 3]], sound[[0, 2, 3]])  # type: ignore[index]
