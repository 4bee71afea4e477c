"""Members in processes with a GPU each, over NCCL: the tokens of one, whatever is lost.

Without GPUs the same processes meet over gloo: what is tested then is what measures NCCL.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import pytest
import torch
from bench import nccl_members
from bench.nccl_layout import Layout, layouts, requests
from bench.spread import children

from whalepod.model.checkpoint import Checkpoint

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
DEMO = "models/demo"
HERE = [
    pytest.param("cpu", 3, marks=pytest.mark.slow),
    pytest.param(
        *("cuda", min(4, GPUS)),
        marks=[
            pytest.mark.multigpu,
            pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices here"),
        ],
    ),
]
pytestmark = pytest.mark.timeout(900)


def started(device: str, count: int) -> Any:
    script = nccl_members.__file__
    return children(script, count, device == "cuda", "--device", device, "--model", DEMO)


def arguments(device: str, count: int) -> argparse.Namespace:
    return argparse.Namespace(
        model=DEMO, layers=8, device=device, gpus=count, layouts=[], micro_batches=2
    )


@pytest.mark.parametrize(("device", "count"), HERE)
def test_members_in_processes_give_the_tokens_of_one(device: str, count: int) -> None:
    args, alone = arguments(device, count), dict[str, list[int]]()
    todo = requests(Checkpoint.open(DEMO).config, 8, 60, 24)
    for name, shape in {"single": {"layout": "single"}, **layouts(count)}.items():
        with started(device, 1 if name == "single" else count) as ranks:
            layout = Layout(args, ranks, **shape)
            layout.enter()
            for _ in range(2):  # a size is captured when it is met again
                found, _ = layout.run(todo)
                alone = alone or found
                assert found == alone, name


@pytest.mark.parametrize(("device", "count"), HERE)
def test_a_killed_expert_member_changes_no_token(device: str, count: int) -> None:
    if count < 3:
        pytest.skip("an expert is lost among two expert members or more")
    args = arguments(device, count)
    with started(device, count) as ranks:
        layout = Layout(args, ranks, attention=1, experts=count - 1, router="attention")
        layout.enter()
        todo = requests(layout.model, 4, 60, 300)
        want, _ = layout.run(todo)
        (home,) = layout.submit(todo)
        home.hear("decoding")
        layout.lose(f"experts-{count - 2}")
        layout.enter()
        said = home.hear("done")
        assert said["tokens"] == want
        assert all(b >= a for t in said["times"].values() for a, b in pairwise(t))
