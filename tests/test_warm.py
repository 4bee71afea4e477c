"""Passes over nothing before the first request: they run, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_fixed import Uncaptured
from test_packed import prompts, run, tokens

from whalepod.cluster.placement import Placement
from whalepod.config import Model
from whalepod.engine.local import SingleEngine
from whalepod.engine.source import Source
from whalepod.engine.warm import sizes_up_to, warm_router, warm_shard, warm_stage
from whalepod.model.checkpoint import Checkpoint


def test_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(12) == [1, 2, 4, 8, 12]


def test_a_warm_stage_draws_what_a_cold_one_draws(tiny: Path) -> None:
    passes: list[int] = []

    def warm(engine: SingleEngine) -> None:
        stage = engine.member.stage
        assert stage is not None
        forward = stage.forward

        def counted(batches: list, *rest: object) -> object:  # type: ignore[type-arg]
            passes.append(sum(b.tokens for b in batches))
            return forward(batches, *rest)  # type: ignore[arg-type]

        stage.forward = counted  # type: ignore[method-assign,assignment]
        with torch.inference_mode():
            warm_stage(stage, 4, 192, 1000)
            warm_stage(stage, 4, 192, 1000, 2)
        stage.forward = forward  # type: ignore[method-assign]

    todo = prompts(1024)
    assert run(tiny, True, change=warm, todo=todo) == run(tiny, True, todo=todo)
    assert {1, 2, 4, 128, 192} <= set(passes)


def test_members_that_compile_warm_up_by_themselves(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = tokens(run(tiny, True))
    warmed: list[tuple[int, ...]] = []

    def noted(stage: object, *sizes: int) -> None:
        warmed.append(sizes)
        warm_stage(stage, *sizes)  # type: ignore[arg-type]

    monkeypatch.setattr("whalepod.engine.member.DecodeGraphs", Uncaptured)
    monkeypatch.setattr("whalepod.engine.member.warm_stage", noted)
    with torch.inference_mode():
        assert tokens(run(tiny, True)) == cold
    assert warmed == [(4, 192, 65536, 2)]


def test_shards_and_routers_run_every_size(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source(Model(path=str(tiny)), Checkpoint.open(tiny), packed=True)
    config, shard, router = source.config, source.shard(), source.router()
    placement = Placement.balanced(config.num_hidden_layers, config.n_routed_experts, ("a", "b"))
    warm_shard(shard, 8)  # nothing is held yet
    shard.prepare(placement, "a", config.layers)
    router.load(config.layers)
    with torch.inference_mode(), caplog.at_level("INFO"):
        warm_shard(shard, 40)
        warm_router(router, 40)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["experts", "router"]
