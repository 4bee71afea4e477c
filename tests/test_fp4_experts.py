"""FP4 experts: the packed layout, and the twin against a plain computation in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whalepod.kernels import fp4_experts as module
from whalepod.kernels.fp4 import Fp4Stack, decode, pack, unpack
from whalepod.kernels.fp4_experts import fp4_experts
from whalepod.kernels.jit import on_hopper
from whalepod.model.quant import decode_fp4, encode_fp4, fake_fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
D, W, E, K, LIMIT = (512, 512, 12, 3, 1.5) if GPU else (160, 96, 6, 3, 1.5)
HELD = [4, 0, 3, 5]  # expert -> place in the stacks, others are absent


def checkpoint(count: int, rows: int, columns: int, size: float) -> tuple[Tensor, Tensor]:
    made = [encode_fp4(size * torch.randn(rows, columns)) for _ in range(count)]
    packed, scales = zip(*made, strict=True)
    scale = torch.stack([s.view(torch.uint8) for s in scales]).view(torch.float8_e8m0fnu)
    return torch.stack(packed), scale


def stacks() -> tuple[Fp4Stack, Fp4Stack]:
    w13, w2 = checkpoint(len(HELD), 2 * W, D, 0.1), checkpoint(len(HELD), D, W, 0.1)
    return pack(*w13).to(DEVICE), pack(*w2).to(DEVICE)


def slots() -> Tensor:
    table = torch.full((E,), -1, dtype=torch.int32)
    table[HELD] = torch.arange(len(HELD), dtype=torch.int32)
    return table.to(DEVICE)


def inputs(tokens: int, kind: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    experts = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)] or [torch.zeros(K)])[
        :tokens
    ]
    x = torch.randn(tokens, D).to(kind)
    return x.to(DEVICE), experts.long().to(DEVICE), torch.rand(tokens, K).to(DEVICE)


def truth(
    x: Tensor, experts: Tensor, weights: Tensor, w13: Fp4Stack, w2: Fp4Stack, released: bool
) -> Tensor:
    """Row by row in fp64, with the roundings that the operation promises."""
    out = torch.zeros(*experts.shape, D, dtype=torch.float64)
    up_down = decode(w13).double().cpu(), decode(w2).double().cpu()
    for t in range(len(x)):
        row = (fake_fp8(x[t], 128) if released else x[t]).double().cpu()
        for k in range(K):
            if (expert := int(experts[t, k])) in HELD:
                place = HELD.index(expert)
                gate, up = (up_down[0][place] @ row).to(x.dtype).float().chunk(2)
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                inner = gate * torch.sigmoid(gate) * up * weights[t, k].cpu()
                inner = inner.to(x.dtype)
                inner = fake_fp8(inner, 128) if released else inner
                out[t, k] = up_down[1][place] @ inner.double()
    return out


def close(got: Tensor, want: Tensor) -> None:
    error = (got.double().cpu() - want).norm() / want.norm().clamp_min(1e-9)
    assert error < (4e-3 if got.dtype == torch.bfloat16 else 1e-5)  # not less if NaN


@pytest.mark.parametrize("columns", [96, 128, 256])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_packing_keeps_every_bit(columns: int, size: float) -> None:
    packed, scale = checkpoint(2, 10, columns, size)
    packed = torch.randint(-128, 128, packed.shape, dtype=torch.int8)  # every code
    stack = pack(packed, scale)
    codes, scales = unpack(stack)
    assert torch.equal(codes, packed)
    assert torch.equal(scales.view(torch.uint8), scale.view(torch.uint8))
    want = [decode_fp4(p, s) for p, s in zip(packed, scale, strict=True)]
    assert torch.equal(decode(stack), torch.stack(want))


def test_packing_refuses_what_does_not_belong_together() -> None:
    packed, scale = checkpoint(1, 8, 64, 1.0)
    with pytest.raises(ValueError, match=r"expected scales \[1, 8, 2\]"):
        pack(packed, scale[..., :1])
    broken = scale.view(torch.uint8).clone()
    broken[0, 3, 1] = 255
    with pytest.raises(ValueError, match="255"):
        pack(packed, broken.view(torch.float8_e8m0fnu))


@pytest.mark.parametrize("released", [False, True])
def test_the_reference_is_the_plain_computation(released: bool) -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(5, torch.float32)
    got = fp4_experts.reference(x, experts, weights, slots(), w13, w2, LIMIT, released)
    close(got, truth(x, experts, weights, w13, w2, released))


@pytest.mark.triton
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("released", [False, True])
def test_the_twin_gives_the_truth(tokens: int, kind: torch.dtype, released: bool) -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(tokens, kind)
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT, released)
    assert got.shape == (tokens, K, D)
    absent = torch.tensor([int(e) not in HELD for e in experts.flatten()], dtype=torch.bool)
    assert not got.flatten(0, 1)[absent.to(DEVICE)].any()
    close(got, truth(x, experts, weights, w13, w2, released))


@pytest.mark.triton
def test_crowded_experts_have_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One held and one absent expert that all tokens choose, with a few that some do."""
    w13, w2 = stacks()
    x, experts, weights = inputs(37)
    experts[:, 0], experts[:, 1], experts[:, 2] = 4, 1, torch.tensor([0, 3, 5]).repeat(13)[:37]
    tiles = module.Tiles(16, (128, 4), (128, 4), 3, 64)
    monkeypatch.setattr(module, "tiles_of", lambda *_: tiles)
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    assert not got[:, 1].any()
    close(got, truth(x, experts, weights, w13, w2, False))
    plain = tiles._replace(crowd=0)
    monkeypatch.setattr(module, "tiles_of", lambda *_: plain)
    assert torch.equal(got, fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT))


@pytest.mark.triton
@pytest.mark.skipif(not GPU or not on_hopper(torch.device(DEVICE)), reason="kernels for Hopper")
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("tiles", [module._FEW, *(t for _, t in module._TILES)], ids=str)
def test_kernels_for_hopper_have_the_bits_of_the_others(
    tiles: module.Tiles, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(tokens)
    experts[:, 0] = HELD[0]
    monkeypatch.setattr(module, "tiles_of", lambda *_: tiles)
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    monkeypatch.setattr(module.fp4_experts_hopper, "cut_of", lambda *_: None)
    assert torch.equal(got, fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT))


@pytest.mark.triton
def test_scales_above_two_are_exact() -> None:
    w13 = pack(*checkpoint(len(HELD), 2 * W, D, 40.0)).to(DEVICE)
    w2 = pack(*checkpoint(len(HELD), D, W, 40.0)).to(DEVICE)
    assert w13.gain.max() > 1
    x, experts, weights = inputs(3)
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    close(got, truth(x, experts, weights, w13, w2, False))


@pytest.mark.triton
def test_one_token_alone_has_the_bits_it_has_in_company() -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(3)
    # Twice the same, which is held, and an absent one; then ids outside the model.
    experts[0] = torch.tensor([HELD[1], 1, HELD[1]])
    experts[1] = torch.tensor([-1, E + 3, HELD[2]])
    together = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    for t in range(3):
        one = slice(t, t + 1)
        alone = fp4_experts(x[one], experts[one].int(), weights[one], slots(), w13, w2, LIMIT)
        assert torch.equal(alone, together[one])


@pytest.mark.triton
def test_a_nan_is_not_clamped_to_a_number() -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(2)
    experts[:] = HELD[0]
    x[1, 0] = float("nan")
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    assert bool(got[1].isnan().all())
    assert bool(got[0].isfinite().all())


@pytest.mark.triton
def test_ids_outside_the_model_give_zeros() -> None:
    w13, w2 = stacks()
    x, experts, weights = inputs(2)
    experts[0, 0], experts[1, 2] = -1, E + 3
    got = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    assert not got[0, 0].any()
    assert not got[1, 2].any()


@pytest.mark.triton
@pytest.mark.parametrize("tiles", [t for _, t in module._TILES], ids=lambda t: str(t.rows))
def test_a_row_does_not_depend_on_its_company(
    tiles: module.Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    w13, w2 = stacks()
    tokens = 300 if GPU else 5
    x, experts, weights = inputs(tokens)
    alone = [
        fp4_experts(x[t : t + 1], experts[t : t + 1], weights[t : t + 1], slots(), w13, w2, LIMIT)
        for t in (0, tokens - 1)
    ]
    monkeypatch.setattr(module, "tiles_of", lambda pairs, held: tiles)
    together = fp4_experts(x, experts, weights, slots(), w13, w2, LIMIT)
    assert torch.equal(together[[0, tokens - 1]], torch.cat(alone))
