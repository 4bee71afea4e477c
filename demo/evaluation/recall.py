"""Whether the model repeats a fact from far back, and whether it is the indexer that finds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from demo.batches import Source
from demo.documents.protocol import Dialogue, Turn
from demo.documents.recall import facts
from whalepod.model import attention, indexer
from whalepod.model.whole import WholeModel


@dataclass(frozen=True)
class Case:
    """A document, where its answer starts, and how far back the fact stands, in tokens."""

    ids: list[int]
    answer: int
    distance: int


def cases(source: Source, count: int, low: int, high: int, seed: int = 10**9) -> list[Case]:
    """Documents with many facts, one of which, `low` to `high` tokens back, is asked for."""
    rng, found = Random(seed), []
    while len(found) < count:
        wanted = low + (high - low) * len(found) / count
        case = _case(source, rng, wanted, high)
        if case is not None and low <= case.distance <= high:
            found.append(case)
    return found


def _case(source: Source, rng: Random, wanted: float, high: int) -> Case | None:
    chars = int(high * 3.6)
    fill = source.filler(rng)
    known = facts(rng, chars // 300)
    spacing = chars // len(known)
    index = max(0, min(len(known) - 1, int(len(known) * (1 - wanted / high))))
    body: list[str] = []
    for fact in known:
        body += [fact.said, fill(max(60, spacing - 120))]
    text, asked = " ".join(body), known[index]
    turn = Turn(f"{text} {asked.asked}", asked.answer)
    prompt = source.ids(Dialogue([turn]).prompt()).tolist()
    ids = source.ids(Dialogue([turn]).text()).tolist()
    if ids[: len(prompt)] != prompt:
        return None
    before = source.ids(Dialogue([turn]).text().split(asked.said)[0] + asked.said)
    return Case(ids, len(prompt), len(prompt) - len(before))


def share_right(model: WholeModel, found: list[Case]) -> float:
    """Share of documents whose whole answer greedy decoding gives (token by token, to EOS)."""
    right = 0
    for case in found:
        state = model.new_state(len(case.ids))
        logits = model.forward(state, case.ids[:-1])[case.answer - 1 :]
        model.release(state)
        right += bool((logits.argmax(-1) == torch.tensor(case.ids[case.answer :])).all())
    return right / len(found)


@contextmanager
def random_choice(seed: int = 0) -> Iterator[None]:
    """The indexer's choice becomes random entries among those a query may see."""
    rng, kept = torch.Generator().manual_seed(seed), (attention.select, indexer.select)

    def choose(scores: Tensor, topk: int) -> Tensor:
        drawn = torch.rand(scores.shape, generator=rng)
        return drawn.masked_fill_(scores == float("-inf"), -1.0).topk(topk, dim=-1).indices

    attention.select = indexer.select = choose  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.select, indexer.select = kept
