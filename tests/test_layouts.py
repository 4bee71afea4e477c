"""The same tokens everywhere: every layout on threads equals `single`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_fabric import StrictFabric

from whalepod.cluster.local_fabric import local_fabrics
from whalepod.config import Config
from whalepod.engine.local import SingleEngine, ThreadedEngine, open_engine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 2": {"layout": "ep", "attention": 2},
    "ep 3, one micro-batch": {"layout": "ep", "attention": 3, "micro_batches": 1},
    "afd 1+1+3": {"attention": 1, "router": "own", "experts": 3},
    "afd 1+1+3, three micro-batches": {"experts": 3, "micro_batches": 3},
    "afd 2 attention, router seated, 2 experts": {
        "attention": 2,
        "router": "attention",
        "experts": 2,
    },
    "afd 2 attention, 2 routers, 2 experts": {"attention": 2, "routers": 2, "experts": 2},
    "2 stages": {"stages": 2, "experts": 2},
    "2 replicas of 3 stages, router seated": {
        "attention": 2,
        "stages": 3,
        "router": "attention",
        "experts": 3,
    },
}
LENGTHS = (5, 150, 33, 1, 260, 64, 129, 12)


def requests(vocabulary: int, count: int, tokens: int) -> list[Request]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(count):
        ids = torch.randint(3, vocabulary - 20, (LENGTHS[i],), generator=generator).tolist()
        settings = Sampling(0.0) if i % 3 else Sampling(0.8, 0.9, 40, seed=i)
        made.append(Request(f"r{i}", tuple(ids), tokens, settings))
    return made


Output = dict[str, list[tuple[int, float]]]


def run(tiny: Path, topology: dict[str, Any], todo: list[Request], **model: Any) -> Output:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny), **model},
            "topology": {"micro_batch_rows": 1, **topology},
            # One chunk a prompt: chunk borders must not depend on how requests are spread.
            "engine": {"max_step_tokens": 2048, "max_batch": 16},
        }
    )
    source = Source(config.model, Checkpoint.open(tiny))
    return drawn(lambda: open_engine(config, source), todo)


def drawn(open_it: Callable[[], SingleEngine | ThreadedEngine], todo: list[Request]) -> Output:
    """What an engine draws, by request."""
    out: Output = {}
    with torch.inference_mode():
        engine = open_it()
        try:
            for event in engine.run(todo):
                out.setdefault(event.request_id, []).append((event.token, event.logprob))
        finally:
            engine.close()
    return out


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Output:
    """Each request by itself in layout `single`."""
    out: Output = {}
    for request in requests(1024, 8, 12):
        out.update(run(tiny, {"layout": "single"}, [request]))
    return out


def test_eight_at_once_equal_one_by_one(tiny: Path, alone: Output) -> None:
    assert run(tiny, {"layout": "single"}, requests(1024, 8, 12)) == alone


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_bit_for_bit(name: str, tiny: Path, alone: Output) -> None:
    assert run(tiny, LAYOUTS[name], requests(1024, 8, 12)) == alone


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> list[StrictFabric]:
    """Fabrics with the manners of NCCL for every layout of the test."""
    made: list[StrictFabric] = []

    def fabrics(names: list[str], **settings: Any) -> list[StrictFabric]:
        made.extend(StrictFabric(one) for one in local_fabrics(names, **settings))
        return made

    monkeypatch.setattr("whalepod.engine.local.local_fabrics", fabrics)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("ep 3, one micro-batch", "afd 1+1+3, three micro-batches"),
        *("afd 2 attention, 2 routers, 2 experts", "2 replicas of 3 stages, router seated"),
    ],
)
def test_legs_that_travel_in_one_call_change_no_bit(
    name: str, tiny: Path, alone: Output, strict: list[StrictFabric]
) -> None:
    assert run(tiny, LAYOUTS[name], requests(1024, 8, 12)) == alone
    assert all(fabric.calls for fabric in strict)


@pytest.mark.parametrize("name", ["ep 2", "afd 1+1+3", "2 stages"])
def test_one_request_alone_in_a_layout(name: str, tiny: Path, alone: Output) -> None:
    request = requests(1024, 2, 12)[1]
    assert run(tiny, LAYOUTS[name], [request]) == {request.id: alone[request.id]}


@pytest.mark.parametrize("model", [{"fidelity": "released"}, {"dtype": "bf16"}])
def test_other_arithmetic_agrees_between_layouts(model: dict[str, Any], tiny: Path) -> None:
    todo = requests(1024, 3, 6)
    single = run(tiny, {"layout": "single"}, todo, **model)
    spread = run(tiny, {"experts": 3}, todo, **model)
    assert {k: [t for t, _ in v] for k, v in spread.items()} == {
        k: [t for t, _ in v] for k, v in single.items()
    }


def test_chunked_prefill_gives_the_same_tokens(tiny: Path, alone: Output) -> None:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"layout": "single"},
            "engine": {"max_step_tokens": 37, "max_batch": 4},
        }
    )
    with torch.inference_mode():
        engine = open_engine(config, Source(config.model, Checkpoint.open(tiny)))
        out: dict[str, list[int]] = {}
        for event in engine.run(requests(1024, 8, 12)):
            out.setdefault(event.request_id, []).append(event.token)
    assert out == {k: [t for t, _ in v] for k, v in alone.items()}


def test_replicas_of_experts_change_no_bit(tiny: Path, alone: Output) -> None:
    """Experts on two shards each, used in turn: the placement of a sum's parts does not matter."""
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": {"experts": 3},
            "engine": {"max_step_tokens": 2048, "max_batch": 16},
        }
    )
    source = Source(config.model, Checkpoint.open(tiny))
    todo = requests(1024, 8, 12)
    assert drawn(lambda: ThreadedEngine(config, source, replicas=1), todo) == alone
