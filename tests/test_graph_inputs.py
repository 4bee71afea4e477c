"""What graphs read, step after step, while sequences grow, leave and change places."""

from __future__ import annotations

from random import Random

import torch

from whalepod.engine.graph import GraphInputs
from whalepod.engine.request import Sampling
from whalepod.engine.step import Part


def test_graphs_read_what_the_parts_say() -> None:
    rng, inputs = Random(5), GraphInputs(6, 8, torch.device("cpu"))
    tables = {slot: tuple(range(10 * slot, 10 * slot + 3)) for slot in range(9)}
    for _ in range(60):
        grown = rng.randrange(9)
        tables[grown] = tuple(rng.sample(range(500), rng.randint(1, 8)))
        parts = tuple(
            Part(slot, rng.randrange(900), (rng.randrange(99),), tables[slot], (Sampling(), 1))
            for slot in rng.sample(sorted(tables), rng.randint(1, 6))
        )
        numbers, found = inputs.put(parts)
        # Rows to spare repeat the first.
        for row, part in enumerate([*parts, *parts[:1] * (6 - len(parts))]):
            assert numbers[:, row].tolist() == [part.ids[0], part.start, part.slot]
            assert found[row, : len(part.blocks)].tolist() == list(part.blocks)
