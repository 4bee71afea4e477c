"""Branches of graphs: what a program sees of them where nothing is captured."""

from __future__ import annotations

import pytest
import torch

from whalepod.kernels.beside import Beside, lane
from whalepod.kernels.counters import zeros

CPU = torch.device("cpu")


def test_a_branch_runs_in_the_order_of_the_program() -> None:
    seen = [lane()]
    with Beside(CPU) as branch:
        seen.append(lane())
    seen.append(lane())
    branch.join()
    branch.join()  # a second time there is nothing to wait for
    assert seen == [0, 1, 0]


def test_branches_share_no_counters() -> None:
    ours = zeros(CPU, 8)
    with Beside(CPU):
        others = zeros(CPU, 8)
    assert others.data_ptr() != ours.data_ptr()
    assert zeros(CPU, 8) is ours, "the same for every launch of a branch"
    with Beside(CPU):
        assert zeros(CPU, 8) is others


def test_an_error_leaves_the_branch() -> None:
    with pytest.raises(KeyError), Beside(CPU):
        raise KeyError
    assert lane() == 0


def test_a_branch_has_no_branches() -> None:
    with Beside(CPU):
        with pytest.raises(AssertionError, match="no branches"), Beside(CPU):
            pass
        assert lane() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_graph_waits_for_its_branches() -> None:
    device = torch.device("cuda")
    x, w = torch.ones(64, device=device), torch.randn(2048, 2048, device=device)
    graph = torch.cuda.CUDAGraph()
    _ = w @ w
    with torch.cuda.graph(graph):
        with Beside(device) as branch:
            slow = x
            for _ in range(50):
                slow = slow + (w @ w).sum() * 0 + 1
        quick = x * 2
        branch.join()
        out = slow + quick
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full_like(out, 50 + 3 * value))
