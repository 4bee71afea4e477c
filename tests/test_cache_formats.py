"""Entries as they are stored: bytes against the format's definition, and an engine that sees no difference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.memory import blocks_within, kv_format, memory_table, weight_bytes
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.errors import ConfigError
from whalepod.kernels.entries import Pages, put, round_entries
from whalepod.kernels.index_scores import read_keys
from whalepod.kernels.unpack import read_entries
from whalepod.model.cache import Cache
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.names import tensor_specs
from whalepod.model.shape import ModelConfig

DEMO, MODELS = Path("models/demo"), Path("configs/models")


@pytest.mark.parametrize(
    ("model", "tokens", "block"), [("pro", 5031, 644_024), ("flash", 3514, 449_824)]
)
def test_bytes_a_token_from_what_is_allocated(model: str, tokens: int, block: int) -> None:
    config = ModelConfig.from_file(MODELS / f"deepseek-v4-{model}.json")

    def allocated(blocks: int) -> int:
        cache = Cache(
            *(config, config.layers), slots=2, blocks=blocks, device="meta", format="released"
        )
        assert int(cache.token_bytes) == tokens
        return cache.nbytes

    assert allocated(9) - allocated(2) == 7 * block
    assert block // 128 == tokens


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bf16(low: int, high: int) -> float:
    bits = torch.tensor(
        [(high << 24 | low << 16) - (1 << 32 if high > 127 else 0)], dtype=torch.int32
    )
    return float(bits.view(torch.float32))


def e2m1(code: int) -> float:
    size = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
    return -size if code & 8 else size


def test_key_value_entries_by_their_bytes() -> None:
    torch.manual_seed(0)
    entries = (torch.randn(5, 512) * torch.logspace(-3, 2, 512)).bfloat16()
    pages = Pages(torch.full((3, 32 * 584), 255, dtype=torch.uint8), 32, 576, 8)
    rows = torch.tensor([0, 95, 31, 32, 64])
    put(pages, rows, entries, "kv", 64)
    want = round_entries(entries, "kv", 64)
    for row, values in zip(rows.tolist(), want, strict=True):
        page = pages.bytes[row // 32].tolist()
        data = page[row % 32 * 576 :][:576]
        scales = page[32 * 576 + row % 32 * 8 :][:8]
        plain = [e4m3(code) * 2.0 ** (scales[d // 64] - 127) for d, code in enumerate(data[:448])]
        turned = [bf16(*data[448 + 2 * i : 450 + 2 * i]) for i in range(64)]
        assert plain + turned == values.float().tolist()
    assert torch.equal(read_entries(pages, rows, 512), want)


def test_index_keys_by_their_bytes() -> None:
    torch.manual_seed(1)
    keys = torch.randn(3, 128).bfloat16()
    pages = Pages(torch.zeros(2, 4 * 68, dtype=torch.uint8), 4, 64, 4)
    rows = torch.tensor([7, 0, 2])
    put(pages, rows, keys, "index", 0)
    want = round_entries(keys, "index", 0)
    for row, values in zip(rows.tolist(), want, strict=True):
        page = pages.bytes[row // 4].tolist()
        data, scales = page[row % 4 * 64 :][:64], page[256 + row % 4 * 4 :][:4]
        codes = [nibble for byte in data for nibble in (byte & 15, byte >> 4)]
        made = [e2m1(code) * 2.0 ** (scales[d // 32] - 127) for d, code in enumerate(codes)]
        assert made == values.float().tolist()
    assert torch.equal(read_keys(pages, rows.view(1, 3))[0], want.float())


def config_of(model: dict[str, Any] | None = None, **engine: Any) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(DEMO), **(model or {})},
            "topology": {"layout": "single"},
            "engine": {"max_step_tokens": 96, "max_batch": 3, **engine},
        }
    )


def run(packed: bool, **engine: Any) -> tuple[dict[str, list[tuple[int, float]]], SingleEngine]:
    config = config_of({"dtype": "bf16", "fidelity": "released"}, **engine)
    found = SingleEngine(config, Source(config.model, Checkpoint.open(DEMO), packed=packed))
    generator = torch.Generator().manual_seed(2)
    shared = torch.randint(3, 4000, (256,), generator=generator).tolist()
    out: dict[str, list[tuple[int, float]]] = {}
    for turn in range(2):  # the second turn goes on from known prefixes
        todo = [
            Request(f"{turn}-{i}", (*shared[: 20 + 118 * i], 7 + i), 6, Sampling(0.0))
            for i in range(3)
        ]
        for event in found.run(todo):
            out.setdefault(event.request_id, []).append((event.token, event.logprob))
    return out, found


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("drafts", [0, 2])
def test_stored_as_released_changes_no_bit(packed: bool, drafts: int) -> None:
    plain, wide = run(packed, kv_format="plain", draft_tokens=drafts)
    released, narrow = run(packed, draft_tokens=drafts)
    assert released == plain
    caches = [e.member.stage.cache for e in (wide, narrow) if e.member.stage is not None]
    assert [c.format for c in caches] == ["plain", "released"]
    assert caches[1].token_bytes < 0.65 * caches[0].token_bytes


def test_the_format_follows_the_fidelity() -> None:
    model = ModelConfig.from_file(DEMO / "config.json")
    assert kv_format(config_of(), model) == "plain"
    assert kv_format(config_of({"dtype": "bf16", "fidelity": "released"}), model) == "released"
    assert kv_format(config_of({"fidelity": "released"}), model) == "plain", "rotary dims are fp32"
    with pytest.raises(ConfigError, match=r"kv_format=released needs model.fidelity=released"):
        config_of(kv_format="released")
    odd = model.model_copy(update={"qk_rope_head_dim": 32})
    forced = config_of({"fidelity": "released"}, kv_format="released")
    with pytest.raises(ConfigError, match="qk_rope_head_dim 32"):
        kv_format(forced, odd)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_budget_counts_the_weights_that_are_read(packed: bool, dtype: str) -> None:
    config = config_of({"dtype": dtype})
    source = Source(config.model, Checkpoint.open(DEMO), packed=packed)
    for layers in (source.config.layers, range(3), range(3, 7)):
        stage = source.stage(layers, slots=1, blocks=1)
        size = 4 if dtype == "fp32" else 2
        specs = tensor_specs(source.config).values()
        counted = weight_bytes(specs, source.config, layers, size, packed)
        assert math.isclose(counted, stage.weight_bytes, rel_tol=0.01)


def test_a_budget_becomes_blocks() -> None:
    model = ModelConfig.from_file(DEMO / "config.json")
    budget = {"memory_gib": 0.25, "prefix_snapshots": 4}
    whole = blocks_within(config_of(**budget), model, [model.layers], packed=False)
    halves = [range(3), range(3, 7)]
    apart = blocks_within(config_of(**budget), model, halves, packed=False)
    assert whole > 3
    assert apart > whole, "each half has a budget of its own"
    assert blocks_within(config_of(kv_tokens=1280), model, halves, packed=False) == 10
    with pytest.raises(
        ConfigError, match=r"memory_gib=0.001 leaves -.* MiB for KV on layers 0 to 6"
    ):
        blocks_within(config_of(memory_gib=0.001), model, [model.layers], packed=False)


def test_a_member_fills_its_budget_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "whalepod")
    config = config_of(memory_gib=0.25)
    engine = SingleEngine(config, Source(config.model, Checkpoint.open(DEMO)))
    stage = engine.member.stage
    assert stage is not None
    free = int(0.25 * 2**30) - stage.weight_bytes - stage.cache.nbytes
    table = memory_table("m", stage.weight_bytes, stage.cache, 0, 0.25)
    assert f"{free / 2**20:,.1f} MiB" in table.splitlines()[-1]
    assert 0 < free < 0.1 * 2**30
    told = caplog.text
    for part, size in stage.cache.parts.items():
        assert f"{part:<20}{size / 2**20:>12,.1f} MiB" in told
