"""FP8 matrices: the packed layout, and the twin against a plain computation in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whalepod.kernels import dense as launches
from whalepod.kernels import dense_hopper, dense_wide
from whalepod.kernels.fp8_linear import Fp8Matrix, decode, fp8_linear, pack
from whalepod.kernels.jit import runs
from whalepod.model.quant import decode_fp8, encode_fp8, fake_fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def matrix(rows: int, columns: int, groups: int = 1) -> Fp8Matrix:
    return pack(*encode_fp8(torch.randn(rows, columns) / 8), groups).to(DEVICE)


def truth(x: Tensor, m: Fp8Matrix, released: bool) -> Tensor:
    split = x.cpu().unflatten(1, (m.groups, m.columns))
    split = fake_fp8(split, 128) if released else split
    return torch.einsum("mgk,gnk->mgn", split.double(), decode(m).double().cpu()).flatten(1)


def close(got: Tensor, want: Tensor, least: float = 1e-5) -> None:
    error = (got.double().cpu() - want).norm() / want.norm().clamp_min(1e-9)
    assert error < (4e-3 if got.dtype == torch.bfloat16 else least)  # not less if NaN


@pytest.mark.parametrize(("rows", "columns", "groups"), [(5, 70, 1), (130, 128, 1), (256, 200, 2)])
def test_packing_keeps_every_value(rows: int, columns: int, groups: int) -> None:
    codes, scale = encode_fp8(torch.randn(rows, columns) * torch.logspace(-6, 3, rows)[:, None])
    packed = pack(codes, scale, groups)
    assert torch.equal(decode(packed).flatten(0, 1), decode_fp8(codes, scale))


def test_packing_refuses_what_the_kernels_cannot_widen() -> None:
    codes, scale = encode_fp8(torch.randn(128, 128))
    for bad in (256.0, 0.3, float("nan")):
        with pytest.raises(ValueError, match=r"expected 2\^n"):
            pack(codes, torch.full(scale.shape, bad))
    with pytest.raises(ValueError, match="expected scales"):
        pack(codes, scale.expand(2, 1))


@pytest.mark.parametrize("released", [False, True])
def test_the_reference_is_the_plain_computation(released: bool) -> None:
    m, x = matrix(256, 200, 2), torch.randn(3, 400, device=DEVICE)
    close(fp8_linear.reference(x, m, released), truth(x, m, released))


SIZES = [(0, 16, 96, 1), (1, 130, 200, 1), (17, 256, 640, 2)]


@pytest.mark.triton
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns", "groups"), SIZES)
def test_the_twin_gives_the_truth(
    rows: int, outputs: int, columns: int, groups: int, kind: torch.dtype, released: bool
) -> None:
    m, x = matrix(outputs, columns, groups), torch.randn(rows, groups * columns).to(DEVICE, kind)
    got = fp8_linear(x, m, released)
    assert got.shape == (rows, outputs)
    assert got.dtype == kind
    # The FP8 units of a GPU add a block's products with fewer bits than fp32 has.
    close(got, truth(x, m, released), 5e-4 if GPU and released else 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("released", [False, True])
def test_a_row_does_not_depend_on_its_company(
    released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:  # the same paths with fewer rows
        monkeypatch.setattr(launches, "_APART_ROWS", 2)
        monkeypatch.setattr(launches, "_JOIN_ROWS", 1)
        monkeypatch.setattr(launches, "_SMALL", ((64, 16, 4, 4), (64, 32, 4, 4)))
    m, rows = matrix(256, 1280, 2), 300 if GPU else 3
    x = torch.randn(rows, 2560).to(DEVICE, torch.bfloat16)
    together = fp8_linear(x, m, released)
    for count in (1, 17, 33, 128, 129) if GPU else (1, 2):
        assert torch.equal(fp8_linear(x[:count], m, released), together[:count])


@pytest.mark.parametrize("kind", ["fp8", "quant", "bf16"])
@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 5000])
def test_every_cut_fits_a_processor(rows: int, kind: dense_hopper.Kind) -> None:
    sizes = [(1536, 4096, 1), (32768, 1024, 1), (1024, 4096, 8), (4096, 8192, 1), (129280, 7168, 1)]
    for outputs, columns, groups in (*sizes, (64, 4096, 1), (65536, 1536, 1), (7168, 16384, 1)):
        chunk = launches.chunk_of(outputs, columns, groups, kind)
        chunks = -(-columns // 128 // chunk)
        cut = dense_hopper.cut_of(kind, rows, outputs, columns, groups, chunks)
        assert dense_hopper.shared_bytes(kind, cut) <= 220 << 10
        assert not cut.apart or (chunks > 1 and rows <= 256)
        assert cut.rows >= min(rows, 64)


@pytest.mark.triton
@pytest.mark.parametrize(("outputs", "columns", "groups"), [(256, 1280, 2), (130, 256, 1)])
def test_widening_a_matrix_first_changes_no_bit(
    outputs: int, columns: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows of tiles and part of one more."""
    rows = 4200 if GPU else 3
    if not GPU:  # the same paths with fewer rows
        monkeypatch.setattr(dense_wide, "LEAST_ROWS", 3)
        monkeypatch.setattr(dense_wide, "_SMALL", (128, 16, 64, 8, 4))
    m, x = matrix(outputs, columns, groups), torch.randn(rows, groups * columns)
    x = x.to(DEVICE, torch.bfloat16)
    assert not runs(DEVICE) or dense_wide.pays(x, columns)
    together = fp8_linear(x, m)
    for i in (0, 1, rows // 2, rows - 1):
        assert torch.equal(fp8_linear(x[i : i + 1], m), together[i : i + 1])
    close(together[-70:], truth(x[-70:], m, False))
