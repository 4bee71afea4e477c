from __future__ import annotations

import math

import pytest
import torch
from configs_oracle import BASE, yarn

from whalepod.model.rope import frequencies, rotate_, turns
from whalepod.model.shape import ModelConfig

RELEASED = BASE | {
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "rope_scaling": yarn(16, 65536),
    "max_position_embeddings": 1048576,
}


def config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(RELEASED | changes)


@pytest.mark.parametrize("layer", [1, 2], ids=["ratio 4", "ratio 128"])
def test_compressed_layers_have_the_released_frequencies(layer: int) -> None:
    freqs = frequencies(config(), layer).tolist()
    base = [160000 ** (-2 * i / 64) for i in range(32)]
    assert freqs[:16] == pytest.approx(base[:16], rel=1e-6)
    assert freqs[25:] == pytest.approx([f / 16 for f in base[25:]], rel=1e-6)
    # Worked out by hand from low = 15, high = 25.
    assert freqs[16] == pytest.approx(0.002265625, rel=1e-6)
    assert freqs[20] == pytest.approx(2.96977778e-4, rel=1e-6)
    assert freqs[24] == pytest.approx(1.953125e-5, rel=1e-6)
    assert freqs[31] == pytest.approx(5.680529e-7, rel=1e-6)


@pytest.mark.parametrize("layer", [0, 4], ids=["window layer", "MTP block"])
def test_layers_without_compression_have_neither_yarn_nor_its_base(layer: int) -> None:
    wanted = [10000 ** (-2 * i / 64) for i in range(32)]
    assert frequencies(config(), layer).tolist() == pytest.approx(wanted, rel=1e-6)


def test_without_yarn_compressed_layers_keep_their_base() -> None:
    wanted = [160000 ** (-2 * i / 64) for i in range(32)]
    assert frequencies(config(rope_scaling=None), 1).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("factor", "original"), [(4, 64), (16, 32), (2, 4096), (40, 1048576)])
def test_yarn_equals_plain_python(factor: float, original: int) -> None:
    rd, base = 16, 160000

    def pair(turns: float) -> float:
        return rd * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), rd - 1)
    wanted = []
    for i in range(rd // 2):
        f = base ** (-2 * i / rd)
        ramp = min(max((i - low) / (high - low), 0), 1)
        wanted.append(f * (1 - ramp) + f / factor * ramp)
    shape = config(qk_rope_head_dim=rd, rope_scaling=yarn(factor, original))
    assert frequencies(shape, 1).tolist() == pytest.approx(wanted, rel=1e-6)


def test_turns_have_length_one_and_fp32_angles() -> None:
    freqs, positions = frequencies(config(), 1), torch.tensor([0, 1, 77, 65536, 2**20 - 1])
    made = turns(positions, freqs)
    assert torch.equal(made[0], torch.ones(32, dtype=torch.complex64))
    torch.testing.assert_close(made.abs(), torch.ones(5, 32), atol=1e-6, rtol=0)
    # The product is rounded to fp32 before the sine, as the reference does.
    angles = (positions.float()[:, None] * freqs).double()
    torch.testing.assert_close(made.real.double(), angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.imag.double(), angles.sin(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_equals_plain_python(heads: int | None, inverse: bool) -> None:
    dims, rd, positions = 20, 8, [0, 1, 5, 1000]
    freqs = torch.tensor([1.0, 0.3, 0.02, 0.001])
    shape = (4, dims) if heads is None else (4, heads, dims)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = rotate_(x.clone(), turns(torch.tensor(positions), freqs), inverse=inverse)
    before, after = x.view(4, -1, dims).tolist(), made.view(4, -1, dims).tolist()
    for t, position in enumerate(positions):
        for old, new in zip(before[t], after[t], strict=True):
            assert new[: dims - rd] == old[: dims - rd]
            for i, f in enumerate(freqs.tolist()):
                angle = -position * f if inverse else position * f
                a, b = old[dims - rd + 2 * i], old[dims - rd + 2 * i + 1]
                want = (
                    a * math.cos(angle) - b * math.sin(angle),
                    a * math.sin(angle) + b * math.cos(angle),
                )
                got = new[dims - rd + 2 * i], new[dims - rd + 2 * i + 1]
                assert got == pytest.approx(want, abs=2e-4 if position > 5 else 1e-5)


def test_rotation_works_in_place_on_views_and_the_inverse_undoes_it() -> None:
    x = torch.randn(6, 40)
    kept, part = x.clone(), x[:, 8:]
    table = turns(torch.arange(6) * 31, frequencies(config(), 1)[:8])
    assert rotate_(part, table) is part
    assert torch.equal(x[:, :24], kept[:, :24])
    assert not torch.allclose(x[1:, 24:], kept[1:, 24:])
    rotate_(part, table, inverse=True)
    torch.testing.assert_close(x, kept, atol=1e-6, rtol=0)


def test_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 64)
    freqs = frequencies(config(), 1)

    def product(at: int, distance: int) -> float:
        pair = rotate_(torch.stack([q, k]), turns(torch.tensor([at, at - distance]), freqs))
        return float(pair[0] @ pair[1])

    assert product(50, 13) == pytest.approx(product(500, 13), abs=1e-3)
    assert product(50, 13) != pytest.approx(product(50, 14), abs=1e-3)


def test_bf16_is_rotated_in_fp32_and_rounded_once() -> None:
    x = torch.randn(5, 2, 32).bfloat16()
    table = turns(torch.arange(5) * 100, frequencies(config(), 1)[:8])
    wide = rotate_(x.float(), table)
    assert torch.equal(rotate_(x.clone(), table), wide.bfloat16())
