"""On one CUDA device: the layouts give the CPU's tokens, and NCCL groups come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_layouts import LAYOUTS, requests

from whalepod.cluster.fabric import Rendezvous, connect, exchange
from whalepod.config import Config
from whalepod.engine.local import open_engine
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint

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


@pytest.mark.parametrize("name", [None, *LAYOUTS])
def test_layouts_on_cuda_give_the_tokens_of_the_cpu(name: str | None, tiny: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    topology = LAYOUTS[name] if name else {"layout": "single"}
    assert tokens(tiny, topology, "cuda") == tokens(tiny, {"layout": "single"}, "cpu")


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
        assert fabric.exact_sizes
        out, counts = exchange(fabric, rows, [5], None)
        assert torch.equal(out, rows)
        assert counts == [5]
        fabric.close()
