"""The whole system on Ray with a GPU a member, over NCCL: the same tokens, whoever is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_serving import Served, serving, under_load

DEMO = Path("models/demo")
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
# An attention member that routes, and expert members on all other GPUs but one, to replace what is lost. With
# two GPUs a lost member starts again where it was.
EXPERTS = max(1, min(2, GPUS - 2))

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices here"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = (
        *("topology.router=attention", f"topology.experts={EXPERTS}", "model.dtype=bf16"),
        *("cluster.fabric=nccl", "cluster.gpus_per_member=1"),
    )
    state = tmp_path_factory.mktemp("state")
    with serving(DEMO.resolve(), state, *settings, limit_s=600) as found:
        found.settled(attention=1, experts=EXPERTS)
        yield found


@pytest.fixture(scope="module")
def expected(served: Served) -> list[list[int]]:
    """What nothing disturbed."""
    return under_load(served, lambda: None, delay_s=0.05)


def test_streams_repeat_over_nccl(served: Served, expected: list[list[int]]) -> None:
    assert "fabric nccl" in served.command("status")
    assert all(len(tokens) == 120 for tokens in expected)
    assert under_load(served, lambda: None, delay_s=0.05) == expected


@pytest.mark.parametrize("pool", ["experts", "attention"])
def test_a_killed_member_changes_no_token_over_nccl(
    served: Served, expected: list[list[int]], pool: str
) -> None:
    epoch = served.status()["epoch"]

    def kill() -> None:
        os.kill(served.pids(pool)[0], signal.SIGKILL)

    assert under_load(served, kill, delay_s=0.3) == expected
    served.until(lambda: served.status()["epoch"] > epoch, 120)
    served.settled(attention=1, experts=EXPERTS)
