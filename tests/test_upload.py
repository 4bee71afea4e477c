"""Small tensors that go to a device and come back."""

from __future__ import annotations

import math

import pytest
import torch

from whalepod.engine.request import Sampling
from whalepod.engine.sampler import _draw_all, _on_device
from whalepod.engine.upload import Coming, upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


def test_every_bit_comes_back(device: torch.device) -> None:
    ids = [0, -1, 2**62, -(2**63)]
    values = [0.1, -0.0, math.inf, -math.inf, math.nan]
    there = upload(torch.tensor(ids), device), upload(torch.tensor(values), device)
    assert there[0].device.type == device.type
    got_ids, got_values = Coming(*there).take()
    assert got_ids == ids
    assert torch.equal(torch.tensor(got_values).view(torch.int32), torch.tensor(values).view(torch.int32))  # fmt: skip
    assert Coming(there[0][:0], there[1][:0]).take() == ([], [])


def test_what_is_sent_may_change_afterwards(device: torch.device) -> None:
    host = torch.zeros(1 << 16)
    if device.type == "cuda":
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy
    sent = []
    for i in range(20):
        host.fill_(i)
        sent.append(upload(host, device).sum())
    assert torch.stack(sent).tolist() == [i * float(1 << 16) for i in range(20)]


def test_draws_on_a_device_are_those_of_the_host() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    settings = [Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.7, top_k=3), Sampling(0.0), Sampling(0.9, top_p=0.5)]  # fmt: skip
    positions = [3, 9, 27, 81, 243]
    got, want = _on_device(logits, settings, positions), _draw_all(logits, settings, positions, None, None)  # fmt: skip
    assert [d.token for d in got] == [d.token for d in want]
    assert torch.allclose(torch.tensor([d.logprob for d in got]), torch.tensor([d.logprob for d in want]))  # fmt: skip
