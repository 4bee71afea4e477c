"""Decode steps captured in CUDA graphs: one launch a step instead of hundreds.

A graph belongs to a number of rows and a width of block tables; a pass that needs less runs in the next
larger one. Rows to spare repeat the first row: they compute what it computes, and write the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from whalepod.engine.experts import LocalExperts
from whalepod.engine.step import MicroBatch
from whalepod.model.batch import Batch

if TYPE_CHECKING:
    from whalepod.engine.attention import AttentionStage

_ROWS = (*range(1, 9), *range(12, 33, 4), 48, 64, 96, 128, 192, 256)
_LEAST_WIDTH = 8


def rows_of(count: int) -> int | None:
    """Rows of the graph that takes so many, or None for more than any does."""
    return next((rows for rows in _ROWS if rows >= count), None)


def width_of(blocks: int) -> int:
    """Width of the tables of the graph that takes so many blocks a sequence."""
    return max(_LEAST_WIDTH, 1 << (blocks - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph | None
    numbers_3T: Tensor
    table_TB: Tensor
    batch: Batch
    x_TCD: Tensor
    logits_TV: Tensor


class DecodeGraphs:
    """The graphs of a stage that has every layer; experts are in the same process.

    Args:
        capture: False runs the same passes without graphs, as a machine without CUDA does.
    """

    def __init__(self, stage: AttentionStage, *, capture: bool = True) -> None:
        self.stage, self.capture = stage, capture
        self._captured: dict[tuple[int, int], Captured] = {}
        self._places: tuple[int, ...] = ()
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    @staticmethod
    def able(stage: AttentionStage) -> bool:
        """Whether steps of a stage can be captured: the attention kernels take BF16 alone."""
        whole = len(stage.layers) == stage.config.num_hidden_layers
        return whole and stage.device.type == "cuda" and stage.dtype == torch.bfloat16

    def run(
        self, micro_batch: MicroBatch, experts: LocalExperts
    ) -> tuple[Batch, Tensor, Tensor] | None:
        """Run a pass in which every sequence draws after one token.

        Returns:
            a pass with nothing to commit, streams `[T, C, D]` and logits `[T, V]`, both valid until
            the next call; None for other passes.
        """
        parts = micro_batch.parts
        rows = rows_of(len(parts))
        if rows is None or not all(len(p.ids) == 1 and p.draw for p in parts):
            return None
        if self._places != experts.places:
            # The stacks have moved: what was captured reads memory that is no longer theirs.
            self._captured, self._places = {}, experts.places
        width = width_of(max(len(p.blocks) for p in parts))
        found = self._captured.get((rows, width))
        numbers, table = _inputs(micro_batch, rows, width)
        if found is None:
            found = self._captured[rows, width] = self._record(numbers, table, experts)
        found.numbers_3T.copy_(numbers)
        found.table_TB.copy_(table)
        if found.graph is None:
            found = self._record(numbers, table, experts)
        else:
            found.graph.replay()
        return found.batch, found.x_TCD[: len(parts)], found.logits_TV[: len(parts)]

    def _record(self, numbers: Tensor, table: Tensor, experts: LocalExperts) -> Captured:
        device = self.stage.device
        numbers_3T, table_TB = numbers.to(device), table.to(device)
        if not self.capture:
            return Captured(None, numbers_3T, table_TB, *self._pass(numbers_3T, table_TB, experts))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles kernels; doing a pass twice changes nothing
            self._pass(numbers_3T, table_TB, experts)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            made = self._pass(numbers_3T, table_TB, experts)
        return Captured(graph, numbers_3T, table_TB, *made)

    def _pass(
        self, numbers_3T: Tensor, table_TB: Tensor, experts: LocalExperts
    ) -> tuple[Batch, Tensor, Tensor]:
        stage = self.stage
        ids_T, positions_T, slots_T = numbers_3T
        batch = Batch.decode(ids_T, positions_T, slots_T, table_TB, stage.cache.block_tokens)
        x_TCD = stage.forward([batch], [stage.embed(batch)], experts)[0]
        assert stage.head is not None
        return batch, x_TCD, stage.head(x_TCD)


def _inputs(micro_batch: MicroBatch, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids, positions and slots `[3, rows]` int64, and block tables `[rows, width]` int32."""
    parts = micro_batch.parts
    parts = (*parts, *(parts[:1] * (rows - len(parts))))
    numbers = np.array(
        [[p.ids[0] for p in parts], [p.start for p in parts], [p.slot for p in parts]]
    )
    table = np.zeros((rows, width), np.int32)
    for row, part in zip(table, parts, strict=True):
        row[: len(part.blocks)] = part.blocks
    return torch.from_numpy(numbers), torch.from_numpy(table)
