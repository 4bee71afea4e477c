"""Steps of fixed sizes: the bits of one member, in every layout, and no step that is not whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_fabric import StrictFabric
from test_layouts import Output, drawn, requests
from torch import Tensor

from whalepod.cluster.local_fabric import local_fabrics
from whalepod.config import Config
from whalepod.engine import fixed_passes, session
from whalepod.engine.fixed import Crowded, fixed_sizes
from whalepod.engine.fixed_form import FixedForm
from whalepod.engine.graph import Captures, DecodeGraphs
from whalepod.engine.lanes import Announcement
from whalepod.engine.local import SingleEngine, ThreadedEngine, open_engine
from whalepod.engine.source import Source
from whalepod.errors import EpochLost
from whalepod.model.checkpoint import Checkpoint

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 2": {"layout": "ep", "attention": 2},
    "ep 3, one micro-batch": {"layout": "ep", "attention": 3, "micro_batches": 1},
    "afd 1+1+3": {"attention": 1, "router": "own", "experts": 3},
    "afd 1+seated+3, three micro-batches": {
        "router": "attention",
        "experts": 3,
        "micro_batches": 3,
    },
    "afd 2+seated+2": {"attention": 2, "router": "attention", "experts": 2},
    "afd 2+2+2": {"attention": 2, "routers": 2, "experts": 2},
    "afd 3+2+2": {"attention": 3, "routers": 2, "experts": 2},
}


class Uncaptured(DecodeGraphs):
    """Passes as graphs run them, without graphs."""

    def __init__(self, stage: Any) -> None:
        super().__init__(stage, capture=False)

    @staticmethod
    def able(stage: Any) -> bool:
        return len(stage.layers) == stage.config.num_hidden_layers


@pytest.fixture
def fixed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layouts with NCCL's manners; collects how many rows steps of fixed sizes had."""
    seen: list[int] = []

    def fabrics(names: list[str], **settings: Any) -> list[StrictFabric]:
        return [StrictFabric(one) for one in local_fabrics(names, **settings)]

    def counted(stage: Any, experts: Any, plan: Any, step: int) -> Any:
        seen.append(sum(map(sum, experts.sizes.rows)))
        return run_fixed(stage, experts, plan, step)

    run_fixed = session.run_fixed
    monkeypatch.setattr(session, "run_fixed", counted)
    monkeypatch.setattr("whalepod.engine.local.local_fabrics", fabrics)
    monkeypatch.setattr("whalepod.engine.member.DecodeGraphs", Uncaptured)
    # Nothing is compiled here (test_warm.py has that).
    monkeypatch.setattr("whalepod.engine.member.warm_stage", lambda *_: None)
    return seen


def run(tiny: Path, topology: dict[str, Any], replicas: int = 0) -> Output:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"micro_batch_rows": 1, **topology},
            "engine": {"max_step_tokens": 2048, "max_batch": 16},
            "cluster": {"step_deadline_s": 20},
        }
    )
    source = Source(config.model, Checkpoint.open(tiny), packed=True)

    def engine() -> SingleEngine | ThreadedEngine:
        if replicas:
            return ThreadedEngine(config, source, replicas=replicas)
        return open_engine(config, source)

    return drawn(engine, requests(1024, 8, 12))


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Output:
    return run(tiny, {"layout": "single"})


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_of_fixed_sizes_change_no_bit(
    name: str, tiny: Path, alone: Output, fixed_steps: list[int]
) -> None:
    assert run(tiny, LAYOUTS[name]) == alone
    assert len(fixed_steps) >= 8
    assert max(fixed_steps) >= 4


@pytest.mark.slow
def test_experts_on_several_shards_change_no_bit(
    tiny: Path, alone: Output, fixed_steps: list[int]
) -> None:
    assert run(tiny, {"experts": 3}, replicas=1) == alone
    assert fixed_steps


def stale(
    answer: Callable[..., tuple[Tensor, dict[int, int]]],
) -> Callable[..., tuple[Tensor, dict[int, int]]]:
    """A shard whose rows never came: its communicator was aborted, and old bytes lay there."""

    def one(
        legs: Any, layer: int, rows: Any, wide: bool, came: Tensor
    ) -> tuple[Tensor, dict[int, int]]:
        return answer(legs, layer, rows, wide, came.clone().fill_(0))

    return one


def test_a_step_without_its_seal_is_void(
    tiny: Path, fixed_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed_passes, "answer", stale(fixed_passes.answer))
    with pytest.raises(EpochLost, match="without its seal"):
        run(tiny, {"router": "attention", "experts": 2})
    assert len(fixed_steps) == 1


def test_sizes_follow_from_the_header() -> None:
    def said(*rows: int, even: bool = True) -> Announcement:
        a, b, c = (*rows, 0, 0, 0)[:3]
        return Announcement((a, b, c), even=even)

    def wide(one: Announcement) -> Announcement:
        return replace(one, wide=True)

    assert fixed_sizes({0: said(3, 2), 1: said(9)}) == (((3, 12), (2, 0)), False)
    assert fixed_sizes({0: said(3), 1: said(0, even=False)}) == (((3, 0),), False)
    assert fixed_sizes({0: said(3), 1: said(40, even=False)}) is None
    assert fixed_sizes({0: said(3), 1: wide(said(2))}) == (((3, 2),), True)
    assert fixed_sizes({0: said(3), 1: wide(said(0))}) == (((3, 0),), False)
    assert fixed_sizes({0: said(0), 1: said(0)}) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep 3, one micro-batch", "afd 2+2+2"])
def test_a_crowded_shard_voids_the_step_and_the_next_has_room(
    name: str, tiny: Path, alone: Output, fixed_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(form: FixedForm, rows: int, wide: bool) -> int:
        return rows * form.k if wide else 1

    crowded: list[int] = []

    def counted(stage: Any, experts: Any, plan: Any, step: int) -> Any:
        try:
            return run_fixed(stage, experts, plan, step)
        except Crowded:
            crowded.append(step)
            raise

    run_fixed = session.run_fixed
    monkeypatch.setattr(FixedForm, "room", room)
    monkeypatch.setattr(session, "run_fixed", counted)
    monkeypatch.setattr(session, "_WIDE_STEPS", 3)
    assert run(tiny, LAYOUTS[name]) == alone
    assert len(crowded) >= 2, "it happens again once the wide steps are over"
    assert len(fixed_steps) > len(crowded)


def test_room_is_twice_an_even_share() -> None:
    form = FixedForm(width=64, dtype=torch.bfloat16, k=6, shards=4)
    assert [form.room(n, wide=False) for n in (1, 4, 128)] == [6, 20, 392]
    assert [form.room(n, wide=True) for n in (1, 4, 128)] == [6, 24, 768]


def test_without_cuda_work_is_done_each_time() -> None:
    done: list[int] = []
    captures = Captures[int](capture=False)
    for _ in range(3):
        captures.run("a", (), lambda: done.append(1) or len(done))  # type: ignore[func-returns-value]
    assert len(done) == 3
