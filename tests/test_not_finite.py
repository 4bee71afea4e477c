"""A NaN or an infinity ends the requests whose logits it reaches, says so, and reaches no others."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_checkpoint import edit_tensor
from test_layouts import LAYOUTS, Output, requests
from test_loop import Harness, ask

from whalepod.config import Config
from whalepod.engine.blocks import BlockPool
from whalepod.engine.local import open_engine
from whalepod.engine.prefix import PrefixCache
from whalepod.engine.request import Adjust, Request, Sampling, TokenEvent
from whalepod.engine.sampler import Drawn, sample
from whalepod.engine.source import Source
from whalepod.kernels.draw import best_tokens
from whalepod.model import checkpoint
from whalepod.model.checkpoint import Checkpoint

NAN, INF = math.nan, math.inf
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]
SETTINGS = [
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.7, top_p=0.9),
    Sampling(1.0, top_k=4),
    Sampling(1.0, min_p=0.1, top_p=0.8),
    Sampling(1.0, adjust=Adjust(presence=0.5)),
]


def spoilt(size: int) -> torch.Tensor:
    """Rows 1 to 5 cannot be drawn from; rows 0 and 6 can."""
    logits = torch.randn(7, size, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2], logits[3, size - 1] = NAN, NAN, INF
    logits[4], logits[5, 3], logits[5, 9] = -INF, NAN, INF
    return logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [160, 9001])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_is_drawn_from_logits_that_are_not_finite(
    size: int, settings: Sampling, device: str
) -> None:
    logits, history = spoilt(size).to(device), (1, (0, 7))
    all_rows = sample(logits, [settings] * 7, [3] * 7, [history] * 7)
    assert [d.token >= 0 for d in all_rows] == [True, *[False] * 5, True]
    assert not any(math.isfinite(d.logprob) for d in all_rows[1:6])
    sound = sample(logits[[0, 6]], [settings] * 2, [3] * 2, [history] * 2)
    assert [all_rows[0], all_rows[6]] == sound


def test_the_norm_of_a_spoilt_row_is_not_finite_either() -> None:
    logits = spoilt(160)
    for found in (best_tokens(logits), best_tokens.reference(logits)):
        assert bool(((found[0] >= 0) & (found[0] < 160)).all())
        told = logits.gather(1, found[0].unsqueeze(1)).squeeze(1) - found[1]
        assert told.isfinite().tolist() == [True, *[False] * 5, True]


def test_the_loop_says_why_and_goes_on() -> None:
    harness = Harness()
    harness.loop.submit(ask("a", tokens=3))
    harness.loop.submit(ask("b", tokens=3))
    plan = harness.loop.plan(1)
    assert plan is not None
    harness.loop.finish(plan, [Drawn(-1, NAN), Drawn(100, -0.5)])
    harness.drain()
    ends = {e.request_id: e for e in harness.events if e.finish}
    assert ends["a"].finish == "error"
    assert "logits for this request are not finite" in str(ends["a"].error)
    assert ends["b"].finish == "length"
    harness.assert_empty()


def test_what_a_prefix_cache_forgets_is_not_found_and_can_be_evicted() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, range(2), 2)
    held = [cache.extend(cache.root("a"), (1, 2), pool.take(1)[0])]
    held.append(cache.extend(held[0], (3, 4), pool.take(1)[0]))
    other = [cache.extend(cache.root("b"), (1, 2), pool.take(1)[0])]
    cache.forget("a")
    cache.forget("unknown")
    assert not cache.match([1, 2, 3, 4, 5], "a")
    assert cache.match([1, 2, 3], "b") == other
    fresh = [cache.extend(cache.root("a"), (1, 2), pool.take(1)[0])]
    cache.release(held)
    cache.evict(2)
    assert pool.free == 2
    assert cache.match([1, 2, 3], "a") == fresh


def run(
    model: Path, topology: dict[str, Any], todo: list[Request], device: str
) -> dict[str, list[TokenEvent]]:
    """Serve a model whose weights are not looked at: they stand for memory that spoils them later."""
    config = Config.from_dict(
        {
            "model": {"path": str(model)},
            "topology": {"micro_batch_rows": 1, **topology},
            "engine": {"max_step_tokens": 64, "max_batch": 8},
        }
    )
    out: dict[str, list[TokenEvent]] = {}
    unseen = mock.patch.object(checkpoint, "how_many_spoilt", return_value=0)
    with unseen, torch.inference_mode():
        opened = open_engine(config, Source(config.model, Checkpoint.open(model), device))
        try:
            for event in opened.run(todo):
                out.setdefault(event.request_id, []).append(event)
        finally:
            opened.close()
    return out


def drawn(events: dict[str, list[TokenEvent]], device: str) -> Output:
    """Tokens, and on CPUs the bits of their log-probabilities: on GPUs fp32 does not promise these."""
    exact = device == "cpu"
    return {
        name: [(e.token, e.logprob if exact else 0.0) for e in some]
        for name, some in events.items()
    }


@pytest.fixture(scope="module")
def todo() -> list[Request]:
    return requests(1024, 6, 8)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sound(tiny: Path, todo: list[Request], device: str) -> Output:
    return drawn(run(tiny, {"layout": "single"}, todo, device), device)


@pytest.fixture(scope="module")
def bad(sound: Output, todo: list[Request]) -> int:
    """A token that no request reads."""
    read = {t for r in todo for t in r.prompt_ids} | {t for s in sound.values() for t, _ in s}
    return next(t for t in range(3, 1000) if t not in read)


@pytest.fixture(scope="module")
def broken(tiny: Path, bad: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "tiny"
    shutil.copytree(tiny, folder)

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[bad] = NAN
        return weight

    edit_tensor("embed.weight", change)(folder)
    return folder


@pytest.mark.parametrize("name", [None, *list(LAYOUTS)[:1], "afd 1+1+3", "2 stages"])
def test_a_token_without_a_number_ends_its_requests_alone(
    name: str | None, broken: Path, bad: int, sound: Output, todo: list[Request], device: str
) -> None:
    """Decoding and chunks, with and without sampling; blocks of the ended are used again."""
    topology = LAYOUTS[name] if name else {"layout": "single"}
    ends = [
        dataclasses.replace(
            request,
            id=f"bad {i}",
            prompt_ids=(*request.prompt_ids[: len(request.prompt_ids) * i // 6], bad, 7, 8, 9),
        )
        for i, request in enumerate(todo)
    ]
    mixed = [r for pair in zip(ends, todo, strict=True) for r in pair]
    events = run(broken, topology, mixed, device)
    got = {r.id: events.pop(r.id) for r in ends}
    for events_of_one in got.values():
        assert [e.finish for e in events_of_one] == ["error"]
        assert "not finite" in str(events_of_one[0].error)
    assert drawn(events, device) == sound


def test_spoilt_prompts_are_not_told_of(broken: Path, bad: int, device: str) -> None:
    ids = (5, 6, bad, 7, 8)
    asked = Request("told", ids, 0, Sampling(0.0), prompt_logprobs=2)
    (event,) = run(broken, {"layout": "single"}, [asked], device)["told"]
    assert event.finish == "error"
    assert event.prompt is None
    assert "not finite" in str(event.error)


# One of each kind of weight whose NaN a maximum, a clamp or an exponential could make a number of.
HIDDEN = [
    *("layers.1.attn.attn_sink", "layers.1.attn.q_norm.weight", "layers.2.attn.wq_b.weight"),
    *("layers.1.attn.compressor.ape", "layers.0.hc_attn_base", "layers.3.hc_ffn_scale"),
    *("layers.2.ffn.shared_experts.w1.weight", "layers.2.ffn.shared_experts.w3.weight"),
    *("layers.3.ffn.gate.weight", "hc_head_base"),
]


@pytest.mark.parametrize("name", HIDDEN)
def test_no_kernel_makes_a_number_of_a_nan(name: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))

    def change(weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == torch.float8_e4m3fn:
            weight.view(torch.uint8)[:] = 0x7F
        else:
            weight[:] = NAN
        return weight

    edit_tensor(name, change)(folder)
    asked = Request("a", tuple(range(3, 153)), 2, Sampling(0.0), ignore_eos=True)
    assert run(folder, {"layout": "single"}, [asked], "cpu")["a"][-1].finish == "error"
