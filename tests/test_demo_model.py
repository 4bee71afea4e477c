"""The shipped model: what is in its files, and that it does what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from demo.documents import document, lesson
from demo.evaluation.losses import library_loss
from demo.evaluation.text import CHAT, THINKING, Writer, drafts_accepted, tool_calls

from whalepod.model.checkpoint import Checkpoint
from whalepod.model.whole import WholeModel

MODEL = Path(__file__).parent.parent / "models/demo"
SEED = 10**9 + 12345  # no training row used it


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(MODEL)


@pytest.fixture(scope="module")
def whole() -> WholeModel:
    checkpoint = Checkpoint.open(MODEL)
    return WholeModel(checkpoint.config, checkpoint.everything())


def test_it_ships_in_small_shards_without_the_texts() -> None:
    files = {p.name: p.stat().st_size for p in MODEL.iterdir()}
    shards = [size for name, size in files.items() if name.endswith(".safetensors")]
    assert len(shards) >= 2
    assert max(files.values()) < 16 * 2**20
    assert sum(files.values()) < 25 * 10**6
    assert not [name for name in files if "text" in name or name.endswith(".bin")]
    assert Checkpoint.open(MODEL).unexpected == []


def test_the_card_states_what_was_measured() -> None:
    results = json.loads((MODEL / "results.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert f"{results['drafts_accepted']:.1%}" in card
    assert f"{results['recall']['right']:.0%}" in card
    assert results["chat"][1] in card
    assert "{" not in card.split("## What it writes")[0].replace("{8}", "")


def test_it_answers_and_closes_its_thoughts(writer: Writer) -> None:
    ((_, answer, finish),) = writer.write([CHAT], 40)
    assert (answer, finish) == ("The capital of Norway is Oslo.", "stop")
    ((_, answer, finish),) = writer.write([THINKING], 100)
    assert finish == "stop"
    assert "</think>" in answer
    assert "12" in answer.split("</think>")[1]


@pytest.mark.slow
def test_it_calls_tools_it_was_never_trained_to_call_so(writer: Writer) -> None:
    assert tool_calls(writer, 10, SEED)["well_formed"] >= 8


@pytest.mark.slow
def test_its_drafts_are_accepted(writer: Writer) -> None:
    prompt = document(Random(SEED), "talk").rsplit("</think>", 1)[0] + "</think>"
    assert drafts_accepted(writer, [prompt, CHAT], 60) > 0.6


@pytest.mark.slow
def test_it_remembers_far_beyond_the_window(writer: Writer, whole: WholeModel) -> None:
    asked = right = 0
    for seed in range(SEED, SEED + 3):
        ids = torch.tensor(writer.ids(lesson(Random(seed), 5000)))
        logits = whole.forward(whole.new_state(len(ids)), ids[:-1].tolist())
        wrong = logits.argmax(-1) != ids[1:]
        marks = (ids == writer.ids("<｜Assistant｜>")[0]).nonzero().flatten().tolist()
        ends = (ids == 1).nonzero().flatten()
        for mark in marks:
            end = int(ends[ends > mark][0])
            asked += 1
            right += not wrong[mark + 1 : end].any()
    assert asked >= 10
    assert right / asked >= 0.8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_loss_is_transformers(writer: Writer, whole: WholeModel) -> None:
    text = "".join(document(Random(SEED + i)) for i in range(4))
    row = list(writer.ids(text))[:513]
    logits = whole.forward(whole.new_state(len(row)), row[:-1])
    ours = F.cross_entropy(logits, torch.tensor(row[1:])).item()
    assert ours < 1.0
    assert abs(ours - library_loss(MODEL, [row])) < 1e-3
