"""One request of 65,536 tokens on the demo model: room, memory, and reuse of what it left."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from demo.documents.recall import stories

from whalepod.config import Config
from whalepod.engine.local import SingleEngine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer

MODEL, TOKENS, OUTPUT = Path("models/demo"), 65536, 8


@pytest.fixture(scope="module")
def prompt() -> tuple[int, ...]:
    tokenizer = Tokenizer.open(MODEL)
    assert tokenizer is not None
    fill = stories(Random(3))
    ids = [0]
    while len(ids) < TOKENS:
        ids += tokenizer.encode_text(fill(4000) + " ")
    return tuple(ids[:TOKENS])


def answer(engine: SingleEngine, name: str, ids: tuple[int, ...]) -> tuple[list[object], int, int]:
    """Tokens with log-probabilities, cached prompt tokens, most blocks held."""
    engine.loop.submit(Request(name, ids, OUTPUT, Sampling(0.0), (), True))
    got: list[object] = []
    cached = held = 0
    while engine.loop.busy:
        engine.step()
        held = max([held, *(len(s.blocks) for s in engine.loop.scheduler.running)])
        got += [(e.token, e.logprob) for e in engine.events]
        cached = max([cached, *(e.cached for e in engine.events)])
        engine.events.clear()
    return got, cached, held


@pytest.mark.slow
def test_65536_tokens_take_the_memory_that_the_ratios_say(prompt: tuple[int, ...]) -> None:
    config = Config.from_dict(
        {
            "model": {"path": str(MODEL)},
            "topology": {"layout": "single"},
            "engine": {
                "max_batch": 1,
                "max_context": TOKENS + 128,
                "kv_tokens": TOKENS + 512,
                "prefix_snapshots": 4,
            },
        }
    )
    with torch.inference_mode():
        engine = SingleEngine(config, Source(config.model, Checkpoint.open(MODEL)))
        assert engine.member.stage is not None
        cache, model = engine.member.stage.cache, engine.member.model
        first, cached, held = answer(engine, "first", prompt)
        again, known, _ = answer(engine, "again", prompt)

    assert len(first) == OUTPUT
    assert cached == 0
    # What an earlier request left gives the same bits as computing it.
    assert known >= TOKENS - 512
    assert again == first

    pools = [p for c in cache.layers.values() for p in (c.main, c.index) if p is not None]
    bytes_held = held * sum(p.stored.nbytes for p in pools) / cache.blocks
    # Entries by the published ratios: 3 layers of ratio 4 with an index key each, 2 of ratio 128.
    assert [model.ratio(i) for i in model.layers] == [0, 0, 4, 128, 4, 128, 4]
    entries = 3 * (TOKENS + OUTPUT) // 4 * (128 + 128) + 2 * ((TOKENS + OUTPUT) // 128) * 128
    assert bytes_held == pytest.approx(4 * entries, rel=0.01)
