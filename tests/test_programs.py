"""A few of the random programs of `bench/check_programs.py`, and a short soak."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from bench.check_programs import FAULTS, judge, open_reference, run_program
from bench.soak import faults, soak

from whalepod.config import Config
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tiny: Path) -> Source:
    config = Config.from_dict({"model": {"path": str(tiny)}})
    return Source(config.model, Checkpoint.open(tiny))


def test_random_programs_give_what_a_model_from_scratch_draws(tiny: Path, source: Source) -> None:
    total, model = Counter[str](), open_reference(tiny)
    with torch.inference_mode():
        for seed in range(10**6, 10**6 + 6):
            book, happened = run_program(seed, source, 10)
            total += judge(model, book) + happened
    assert {name: total[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    for wanted in ("preemptions", "prompt tokens found", "drafts right", "cancelled"):
        assert total[wanted] > 0, wanted


def test_the_judge_sees_a_wrong_token_a_wrong_bit_and_a_wrong_end(
    tiny: Path, source: Source
) -> None:
    model = open_reference(tiny)
    with torch.inference_mode():
        book, _ = run_program(3, source, 6)
        name = max(book.done, key=lambda n: len(book.answers[n]))
        token, logprob = book.answers[name][0]
        book.answers[name][0] = (token, logprob + 1e-7)
        assert judge(model, book)["other log-probabilities"] == 1
        book.answers[name][0] = ((token + 1) % 1000, logprob)
        assert judge(model, book)["other tokens"] >= 1
        del book.answers[name][-1]
        assert judge(model, book)["wrong ends"] == 1


@pytest.mark.parametrize("layout", ["single", "afd"])
def test_a_short_soak_leaves_nothing_behind(tiny: Path, layout: str) -> None:
    looks, run = soak(tiny, layout, 100)
    found = faults(looks, run.ends, 100)
    # Memory is flat only over thousands of requests.
    assert [fault for fault in found if not fault.startswith("memory")] == []
    assert run.ends["abort"] > 0
    assert run.ends["length"] > 0
