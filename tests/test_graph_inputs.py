"""What graphs read, step after step, while sequences grow, leave and change places."""

from __future__ import annotations

from random import Random

import torch

from whalepod.engine.graph import GraphInputs, Known
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


def test_ids_that_the_device_alone_knows() -> None:
    inputs, ids = GraphInputs(6, 8, torch.device("cpu")), torch.tensor([70, 71, 72, 73])
    parts = tuple(Part(slot, 9, (0,), (slot,), (Sampling(), 10)) for slot in (4, 2, 5))
    numbers, _ = inputs.put(parts, Known(ids, (3, 0, 1)))
    assert numbers[0].tolist() == [73, 70, 71, 73, 73, 73]
    assert numbers[2].tolist() == [4, 2, 5, 4, 4, 4]
    numbers, _ = inputs.put(parts)
    assert numbers[0].tolist() == [0] * 6
