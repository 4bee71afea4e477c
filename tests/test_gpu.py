"""On one CUDA device: the layouts give the CPU's tokens, and NCCL groups come and go."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from demo.documents.recall import stories
from test_layouts import LAYOUTS, requests

from whalepod.cluster.fabric import exchange
from whalepod.cluster.rendezvous import Rendezvous, connect
from whalepod.config import Config
from whalepod.engine.graph import Captures
from whalepod.engine.local import open_engine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

DEMO = Path("models/demo")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def tokens(tiny: Path, topology: dict[str, Any], device: str) -> dict[str, list[int]]:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny)},
            "topology": topology,
            "engine": {"max_step_tokens": 2048},
        }
    )
    out: dict[str, list[int]] = {}
    with torch.inference_mode():
        engine = open_engine(config, Source(config.model, Checkpoint.open(tiny), device))
        try:
            for event in engine.run(requests(1024, 8, 12)):
                out.setdefault(event.request_id, []).append(event.token)
        finally:
            engine.close()
    return out


@pytest.fixture(scope="module")
def on_cpu(tiny: Path) -> dict[str, list[int]]:
    return tokens(tiny, {"layout": "single"}, "cpu")


@pytest.mark.parametrize("name", [None, *LAYOUTS])
def test_layouts_on_cuda_give_the_tokens_of_the_cpu(
    name: str | None, tiny: Path, on_cpu: dict[str, list[int]]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    topology = LAYOUTS[name] if name else {"layout": "single"}
    assert tokens(tiny, topology, "cuda") == on_cpu


def drawn(device: str, **changes: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Greedy tokens of the demo model for the beginnings of 20 stories."""
    rng = Random(3)
    tokenizer, fill = Tokenizer.open(DEMO), stories(rng)
    assert tokenizer is not None
    config = Config.from_dict(
        {
            "model": {"path": str(DEMO), **changes.get("model", {})},
            "topology": {"layout": "single"},
            "engine": changes.get("engine", {}),
        }
    )
    todo = [
        Request(f"r{i}", tuple(tokenizer.encode_text(fill(300 + 60 * i))), 24, Sampling(0.0))
        for i in range(20)
    ]
    out: dict[str, list[tuple[int, float]]] = {}
    with torch.inference_mode():
        engine = open_engine(config, Source(config.model, Checkpoint.open(DEMO), device))
        for event in engine.run(todo):
            out.setdefault(event.request_id, []).append((event.token, event.logprob))
        engine.close()
    return out


def test_the_demo_model_gives_the_tokens_of_the_cpu() -> None:
    wanted = {k: [t for t, _ in v] for k, v in drawn("cpu").items()}
    assert {k: [t for t, _ in v] for k, v in drawn("cuda").items()} == wanted
    assert len(wanted) == 20


@pytest.mark.parametrize("fidelity", ["plain", "released"])
def test_graphs_give_the_bits_of_single_launches(fidelity: str) -> None:
    model = {"dtype": "bf16", "fidelity": fidelity}
    alone = drawn("cuda", model=model, engine={"cuda_graphs": False})
    assert drawn("cuda", model=model) == alone
    few = drawn("cuda", model=model, engine={"max_batch": 3, "max_step_tokens": 200})
    assert few == alone, "neither company nor chunks change a bit"


def test_tokens_made_get_the_bits_of_tokens_given() -> None:
    """Entries of decoding steps and of chunks come from kernels of their own."""
    model, engine = {"dtype": "bf16"}, {"max_step_tokens": 4096}
    tokenizer = Tokenizer.open(DEMO)
    assert tokenizer is not None
    config = Config.from_dict(
        {
            "model": {"path": str(DEMO), **model},
            "topology": {"layout": "single"},
            "engine": engine,
        }
    )
    ids = tuple(tokenizer.encode_text(stories(Random(4))(300)))
    with torch.inference_mode():
        served = open_engine(config, Source(config.model, Checkpoint.open(DEMO), "cuda"))
        made = [(e.token, e.logprob) for e in served.run([Request("a", ids, 160, ignore_eos=True)])]
        for known in (1, 40, 133, 159):
            prompt = (*ids, *(token for token, _ in made[:known]))
            again = Request("b", prompt, 160 - known, ignore_eos=True)
            assert [(e.token, e.logprob) for e in served.run([again])] == made[known:]
        served.close()


def test_graphs_are_captured_anew_after_they_were_given_back() -> None:
    captures, x = Captures[torch.Tensor](capture=True), torch.ones(8, device="cuda")
    kept = []
    for turn in range(3):
        for _ in range(3):
            made = captures.run("double", (turn % 2,), lambda: x * 2)
        kept.append(made)  # memory of a pool may outlive its graphs
        assert torch.equal(made, x * 2)
        captures.forget()


def test_nccl_groups_are_made_and_aborted_epoch_by_epoch() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    rows = torch.arange(40, dtype=torch.uint8, device="cuda").view(5, 8)
    for epoch in (1, 2, 3):
        fabric = connect(
            epoch,
            0,
            ["a"],
            address=rendezvous.address,
            backend="nccl",
            host="127.0.0.1",
            deadline_s=5,
        )
        assert fabric.together
        out, counts = exchange(fabric, rows, [5], None)
        assert torch.equal(out, rows)
        assert counts == [5]
        fabric.close()
