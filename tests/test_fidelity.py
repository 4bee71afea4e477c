"""`released` against a second model that makes every rounding the release makes.

Where two correct programs differ in the last bit before a rounding, one element in some hundred
thousand rounds the other way. So most positions agree to the last bits and a few do not: the
comparisons ask for the share of positions that agree and for a small mean.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from configs_oracle import BASE, CONFIGS, SEEDS, Config
from oracle_hf import Oracle, Weights, random_weights
from oracle_released import E2M1, E4M3, ROUNDINGS, Reference, nearest, rounded
from torch import Tensor

from whalepod.model.fidelity import Fidelity
from whalepod.model.shape import ModelConfig
from whalepod.model.whole import WholeModel

LENGTH = 200
LAYERS = {"swa": 0, "csa": 4, "hca": 128}
USED = {
    "swa": [r for r in ROUNDINGS if r.split("_")[0] not in ("entries", "index", "mtp")],
    "csa": [r for r in ROUNDINGS if r != "mtp_input"],
    "hca": [r for r in ROUNDINGS if r.split("_")[0] not in ("index", "mtp")],
}


def one_layer(kind: str) -> Config:
    """Matrices as wide as the blocks of the roundings ask, and one layer, so that errors stay put."""
    return BASE | {
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "compress_ratios": [LAYERS[kind], 0],
        "head_dim": 144,
        "qk_rope_head_dim": 16,
        "num_attention_heads": 4,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "index_n_heads": 16,
        "index_head_dim": 64,
        "index_topk": 12,
        "moe_intermediate_size": 128,
    }


def tokens(cfg: Config, seed: int, length: int = LENGTH) -> list[int]:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, cfg["vocab_size"], (length,), generator=g).tolist()


@cache
def model(kind: str) -> WholeModel:
    cfg = one_layer(kind)
    return WholeModel(ModelConfig.from_dict(cfg), random_weights(cfg), fidelity="released")


@cache
def reference(kind: str, left_out: str | None = None, mtp: bool = False) -> Tensor:
    cfg = one_layer(kind)
    made = Reference(cfg, random_weights(cfg), [r for r in ROUNDINGS if r != left_out])
    return made.mtp_logits(tokens(cfg, 0)) if mtp else made.logits(tokens(cfg, 0))


def run(kind: str, sizes: list[int]) -> Tensor:
    whole, ids, parts, at = model(kind), tokens(one_layer(kind), 0), [], 0
    state = whole.new_state(sum(sizes))
    for size in sizes:
        parts.append(whole.forward(state, ids[at : at + size]))
        at += size
    whole.release(state)
    return torch.cat(parts)


def agreement(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the share of positions equal to 1e-5, and the mean difference."""
    error = (a - b).abs()
    return float((error.amax(-1) < 1e-5).float().mean()), float(error.mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_without_roundings_equals_transformers(name: str) -> None:
    cfg, weights = CONFIGS[name], random_weights(CONFIGS[name], SEEDS[name])
    ids, ours, theirs = tokens(cfg, SEEDS[name]), Reference(cfg, weights), Oracle(cfg, weights)
    torch.testing.assert_close(ours.logits(ids), theirs.logits(ids), atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.mtp_logits(ids), theirs.mtp_logits(ids), atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_no_choice_of_the_test_models_is_close(name: str) -> None:
    cfg, weights = CONFIGS[name], random_weights(CONFIGS[name], SEEDS[name])
    made = Reference(cfg, weights)
    made.mtp_logits(tokens(cfg, SEEDS[name], 301))
    assert made.gate_margin > 4e-5
    assert made.index_margin > 4e-5
    if 4 in cfg["compress_ratios"]:
        assert made.index_margin < float("inf")  # the indexer did leave entries out
    assert (made.clamped > 0) == (name == "clamped")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [[200], [61, 1, 1, 66] + [1] * 20 + [51]], ids=["one", "mixed"])
def test_released_equals_the_reference(kind: str, sizes: list[int]) -> None:
    share, mean = agreement(run(kind, sizes), reference(kind))
    assert share > 0.9
    assert mean < 3e-4


@pytest.mark.parametrize("kind", LAYERS)
def test_released_mtp_equals_the_reference(kind: str) -> None:
    ours = model(kind).mtp_logits(tokens(one_layer(kind), 0))
    share, mean = agreement(ours, reference(kind, mtp=True))
    assert share > 0.6
    assert mean < 6e-3
    share, mean = agreement(ours, reference(kind, "mtp_input", mtp=True))
    assert share < 0.1
    assert mean > 2e-2


@pytest.mark.parametrize(("kind", "left_out"), [(k, r) for k, used in USED.items() for r in used])
def test_each_rounding_shows(kind: str, left_out: str) -> None:
    share, mean = agreement(run_once(kind), reference(kind, left_out))
    assert share < 0.9
    assert mean > 2e-3


def uneven(cfg: Config) -> Weights:
    """Weights under which every second block of attention inputs and keys is tiny, yet counts.

    A float format with power-of-two scales rounds alike under every scale that keeps its values
    off the ends of its range, so with even values a block of any width gives the same result.
    """
    made, tiny, plain = random_weights(cfg), 2.0**-13, cfg["head_dim"] - cfg["qk_rope_head_dim"]
    block = torch.where(torch.arange(cfg["hidden_size"]) // 128 % 2 == 1, tiny, 1.0)
    place = torch.arange(cfg["head_dim"])
    key = torch.where((place // 64 % 2 == 1) & (place < plain), tiny, 1.0)
    for name, tensor in made.items():
        if name.endswith(("attn_norm.weight", "ffn_norm.weight")):
            made[name] = tensor * block
        elif name.endswith(("kv_norm.weight", "attn.compressor.norm.weight")):
            made[name] = tensor * key
        elif name.endswith("wo_a.weight"):
            made[name] = tensor / key.repeat(tensor.shape[1] // len(key))
        elif name.startswith("layers.") and tensor.shape[-1:] == block.shape:
            made[name] = tensor / block  # whatever else is as wide as the norms' output reads it
    return made


class TwiceAsWide(Reference):
    """A reference that errs in the width of the FP8 blocks of one rounding."""

    wrong: str

    def fp8(self, x: Tensor, where: str, block: int = 128) -> Tensor:
        return super().fp8(x, where, 2 * block if where == self.wrong else block)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_width_of_each_block_shows(kind: str) -> None:
    cfg = one_layer(kind)
    weights, ids = uneven(cfg), tokens(cfg, 0)
    whole = WholeModel(ModelConfig.from_dict(cfg), weights, fidelity="released")
    ours = whole.forward(whole.new_state(LENGTH), ids)
    share, mean = agreement(ours, Reference(cfg, weights, ROUNDINGS).logits(ids))
    assert share > 0.9
    assert mean < 3e-4
    wide = TwiceAsWide(cfg, weights, ROUNDINGS)
    sites = ["attention_input", "expert_input", "shared_input", "window", "entries"]
    for wide.wrong in sites[: 4 if kind == "swa" else 5]:
        assert agreement(ours, wide.logits(ids))[1] > 2e-3, wide.wrong


@cache
def run_once(kind: str) -> Tensor:
    return run(kind, [LENGTH])


def test_formats_of_the_reference() -> None:
    cast = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3, cast)
    x = torch.linspace(-448, 448, 20001)
    assert torch.equal(nearest(x, E4M3), x.to(torch.float8_e4m3fn).float())
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5])
    assert nearest(ties, E2M1).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -2.0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_roundings_equal_the_reference_bit_for_bit(scale: float) -> None:
    fine, g = Fidelity("released"), torch.Generator().manual_seed(3)
    x = scale * torch.randn(50, 3, 256, generator=g)
    x[0, 0, 0], x[1, 0, :128] = 448.0, 0.0
    assert torch.equal(fine.linear_input(x), rounded(x, E4M3, 128, 1e-4))
    kv = fine.kv(x, 64)
    assert torch.equal(kv[..., :192], rounded(x[..., :192], E4M3, 64, 1e-4))
    assert torch.equal(kv[..., 192:], x[..., 192:])


def test_plain_rounds_nothing() -> None:
    plain, x = Fidelity("plain"), torch.randn(4, 128)
    assert plain.linear_input(x) is x
    assert plain.kv(x, 64) is x
    assert plain.index(x) is x
