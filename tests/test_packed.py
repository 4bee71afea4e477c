"""Packed weights and block tables, as GPUs run them, give what wide weights give; and so do graphs.

Without a GPU the kernels' references run: what is tested here is how they are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.config import Config
from whalepod.engine.graph import DecodeGraphs, rows_of, width_of
from whalepod.engine.local import SingleEngine, ThreadedEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.kernels.fp4_experts import fp4_experts
from whalepod.kernels.jit import INTERPRETED
from whalepod.kernels.registry import Kernel
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.stack import ExpertStack

DEMO = Path("models/demo")
Output = dict[str, list[tuple[int, float]]]


def prompts(vocabulary: int) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for i, length in enumerate((3, 140, 520, 17)):
        ids = torch.randint(3, vocabulary - 20, (length,), generator=generator).tolist()
        made.append(Request(f"r{i}", tuple(ids), 9, Sampling(0.0)))
    return made


def run(
    folder: Path,
    packed: bool,
    *,
    engine: dict[str, Any] | None = None,
    topology: dict[str, Any] | None = None,
    change: Callable[[SingleEngine], None] = lambda _: None,
    todo: list[Request] | None = None,
    **model: Any,
) -> Output:
    config = Config.from_dict(
        {
            "model": {"path": str(folder), **model},
            "topology": topology or {"layout": "single"},
            "engine": {"max_step_tokens": 192, "max_batch": 4, **(engine or {})},
        }
    )
    source = Source(config.model, Checkpoint.open(folder), packed=packed)
    found: SingleEngine | ThreadedEngine
    if topology is None:
        found = SingleEngine(config, source)
        change(found)
    else:
        found = ThreadedEngine(config, source)
    out: Output = {}
    for event in found.run(todo or prompts(source.config.vocab_size)):
        out.setdefault(event.request_id, []).append((event.token, event.logprob))
    found.close()
    return out


def tokens(output: Output) -> dict[str, list[int]]:
    return {name: [token for token, _ in rows] for name, rows in output.items()}


def near(got: Output, want: Output) -> None:
    assert tokens(got) == tokens(want)
    for name, rows in want.items():
        for (_, mine), (_, theirs) in zip(got[name], rows, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2])
def test_packed_weights_give_the_tokens_of_wide_ones(drafts: int) -> None:
    engine = {"draft_tokens": drafts}
    near(run(DEMO, True, engine=engine), run(DEMO, False, engine=engine))


def apart(got: Output, want: Output) -> float:
    """Mean difference of log-probabilities, as far as the tokens are the same."""
    found: list[float] = []
    for name, rows in want.items():
        for (mine, p), (theirs, q) in zip(got[name], rows, strict=True):
            if mine != theirs:
                break
            found.append(abs(p - q))
    assert len(found) > 18, "most of the 36 tokens are the same"
    return sum(found) / len(found)


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch reference of every kernel."""
    monkeypatch.setenv("WHALEPOD_KERNELS", "torch")
    for kernel in Kernel.every:
        kernel.forget()
    yield
    monkeypatch.undo()
    for kernel in Kernel.every:
        kernel.forget()


@pytest.mark.slow
@pytest.mark.usefixtures("references")
def test_packed_weights_round_what_wide_ones_round() -> None:
    # Sums in another order move a few numbers across a rounding; roundings left out move all.
    rounded, plain = (run(DEMO, False, fidelity=f) for f in ("released", "plain"))
    assert apart(run(DEMO, True, fidelity="released"), rounded) < apart(plain, rounded) / 2


def test_sizes_that_do_not_fit_tiles(tiny: Path) -> None:
    near(run(tiny, True), run(tiny, False))


def test_packed_weights_on_several_members(tiny: Path) -> None:
    alone = run(tiny, True)
    for topology in ({"experts": 2}, {"layout": "ep", "attention": 2}):
        near(run(tiny, True, topology=topology), alone)


def test_passes_of_tables_give_what_passes_of_spans_give(tiny: Path) -> None:
    seen: list[int] = []

    def captured(engine: SingleEngine) -> None:
        stage = engine.member.stage
        assert stage is not None
        stage.graphs = DecodeGraphs(stage, capture=False)
        run_it = stage.graphs.run

        def counted(*args: Any) -> Any:
            found = run_it(*args)
            seen.append(0 if found is None else len(found[0][1]))
            return found

        stage.graphs.run = counted  # type: ignore[method-assign]

    assert run(tiny, True, change=captured) == run(tiny, True)
    assert max(seen) == 4
    assert 0 in seen  # prefill has no graph


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="test_gpu.py does so on a GPU")
def test_kernels_run_the_whole_model(tiny: Path) -> None:
    todo = [Request(f"r{i}", (5, 9, 12, 7, 3)[: 5 - i], 2, Sampling(0.0)) for i in range(2)]
    want = run(tiny, False, todo=todo)
    assert fp4_experts.has_twin("cpu")
    near(run(tiny, True, todo=todo), want)


def test_graphs_for_rows_and_widths() -> None:
    assert [rows_of(n) for n in (1, 8, 9, 33, 256, 257)] == [1, 8, 12, 48, 256, None]
    assert [width_of(n) for n in (1, 8, 9, 129)] == [8, 8, 16, 256]


def test_experts_come_and_go(tiny: Path) -> None:
    config = Config.from_dict({"model": {"path": str(tiny)}, "topology": {"layout": "single"}})
    source = Source(config.model, Checkpoint.open(tiny), packed=True)
    all_of_them, some = source.experts(1), source.table()
    assert isinstance(all_of_them, ExpertStack)
    assert isinstance(some, ExpertStack)
    one, two = (source.expert(1, e) for e in (0, 3))
    assert isinstance(one, tuple)
    assert isinstance(two, tuple)
    some[0], some[3] = one, two
    moves = some.moves
    del some[0]
    some[2] = source.expert(1, 2)  # type: ignore[assignment]
    assert some.moves == moves, "the place of expert 0 was free"
    x, weights = torch.randn(5, source.config.hidden_size), torch.rand(5, 2)
    chosen = torch.tensor([[2, 3], [3, 2], [0, 3], [3, 1], [2, 2]])
    got, want = some(x, chosen, weights), all_of_them(x, chosen, weights)
    here = (chosen == 2) | (chosen == 3)
    assert torch.equal(got[here], want[here])
    assert not got[~here].any()
    assert sorted(some) == [2, 3]
    assert some.nbytes == 2 * all_of_them.nbytes // source.config.n_routed_experts
