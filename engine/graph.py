"""Decode steps captured in CUDA graphs: one launch a step instead of hundreds.

A graph belongs to a number of rows and a width of block tables; a pass that needs less runs in the next
larger one. Rows to spare repeat the first row: they compute what it computes, and write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whalepod.engine.step import MicroBatch, Part
from whalepod.engine.upload import sendable
from whalepod.model.batch import Batch

if TYPE_CHECKING:
    from whalepod.engine.attention import AttentionStage

T = TypeVar("T")
_ROWS = (*range(1, 9), *range(12, 33, 4), 48, 64, 96, 128, 192, 256)
_LEAST_WIDTH = 8


def rows_of(count: int) -> int | None:
    """Rows of the graph that takes so many, or None for more than any does."""
    return next((rows for rows in _ROWS if rows >= count), None)


def width_of(blocks: int) -> int:
    """Width of the tables of the graph that takes so many blocks a sequence."""
    return max(_LEAST_WIDTH, 1 << (blocks - 1).bit_length())


class Reached(Protocol):
    """Experts as graphs see them: `key` is what else a graph depends on, besides its own rows."""

    @property
    def places(self) -> tuple[int, ...]:
        """Changes when what was captured reads memory that is no longer theirs."""
        ...

    @property
    def key(self) -> Hashable:
        """Sizes of the step that are not this member's own."""
        ...


class Captures(Generic[T]):
    """Work of the device, captured the second time that it is done, and replayed from then on.

    The first time it runs as it is: kernels are compiled, and members meet whom they exchange with, once a
    step like any other.

    Args:
        capture: False runs everything as it is, as a machine without CUDA does.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self._known: dict[Hashable, tuple[torch.cuda.CUDAGraph, T] | None] = {}
        self._places: tuple[int, ...] = ()
        self.forget()

    def run(self, key: Hashable, places: tuple[int, ...], work: Callable[[], T]) -> T:
        """Do `work`, which reads and writes the same memory whenever `key` and `places` are the same."""
        if not self.capture:
            return work()
        if self._places != places:
            self.forget()
            self._places = places
        if key not in self._known:
            self._known[key] = None
            return work()
        found = self._known[key]
        if found is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                made = work()
            found = self._known[key] = graph, made
        found[0].replay()
        return found[1]

    def forget(self) -> None:
        """Give the graphs back, and with them what they hold of others."""
        self._known = {}
        # A pool that no graph uses any more takes no new ones.
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None


Made = tuple[Batch, Tensor, Tensor]


class DecodeGraphs:
    """The graphs of a stage that has every layer.

    Args:
        capture: False runs the same passes without graphs, as a machine without CUDA does.
    """

    def __init__(self, stage: AttentionStage, *, capture: bool = True) -> None:
        self.stage = stage
        self.captures = Captures[list[Made | None]](capture)
        self._inputs: dict[tuple[int, int, int], GraphInputs] = {}

    @staticmethod
    def able(stage: AttentionStage) -> bool:
        """Whether steps of a stage can be captured: the attention kernels take BF16 alone."""
        whole = len(stage.layers) == stage.config.num_hidden_layers
        return whole and stage.device.type == "cuda" and stage.dtype == torch.bfloat16

    @staticmethod
    def takes(micro_batch: MicroBatch) -> bool:
        """Whether every sequence of a pass draws after one token, and there are not too many."""
        parts = micro_batch.parts
        return rows_of(len(parts)) is not None and all(len(p.ids) == 1 and p.draw for p in parts)

    def run(
        self, micro_batches: Seq[MicroBatch | None], experts: Reached, known: Known | None = None
    ) -> list[tuple[Batch, Tensor, Tensor]] | None:
        """Run passes in which every sequence draws after one token.

        Args:
            micro_batches: those of this member; None where only others have rows.
            known: where the ids of the only one are, which the host does not know.

        Returns:
            for each of its own, a pass with nothing to commit, streams `[T, C, D]` and logits `[T, V]`,
            valid until the next call; None where some pass is of another kind.
        """
        if not all(m is None or self.takes(m) for m in micro_batches):
            return None
        shapes = [(0, 0) if m is None else _shape(m) for m in micro_batches]
        assert known is None or len(micro_batches) == 1
        given = [self._put(i, m, known) if m else None for i, m in enumerate(micro_batches)]
        key = (*shapes, experts.key)
        made = self.captures.run(key, experts.places, lambda: self._pass(given, experts))
        return [
            (found[0], found[1][: len(m.parts)], found[2][: len(m.parts)])
            for found, m in zip(made, micro_batches, strict=True)
            if found is not None and m is not None
        ]

    def _put(
        self, number: int, micro_batch: MicroBatch, known: Known | None
    ) -> tuple[Tensor, Tensor]:
        """Ids, positions and slots `[3, rows]`, and tables `[rows, width]`, where graphs read them."""
        rows, width = _shape(micro_batch)
        found = self._inputs.get((number, rows, width))
        if found is None:
            found = self._inputs[number, rows, width] = GraphInputs(rows, width, self.stage.device)
        return found.put(micro_batch.parts, known)

    def _pass(
        self, given: Seq[tuple[Tensor, Tensor] | None], experts: Reached
    ) -> list[Made | None]:
        stage = self.stage
        size = stage.cache.block_tokens
        batches = [g and Batch.decode(g[0][0], g[0][1], g[0][2], g[1], size) for g in given]
        nothing = torch.empty(0, device=stage.device)
        x = [stage.embed(b) if b is not None else nothing for b in batches]
        x = stage.forward(batches, x, experts)  # type: ignore[arg-type]
        assert stage.head is not None
        return [
            (b, x_TCD, stage.head(x_TCD)) if b is not None else None
            for b, x_TCD in zip(batches, x, strict=True)
        ]


def _shape(micro_batch: MicroBatch) -> tuple[int, int]:
    """Rows and width of tables of the graph that takes a pass."""
    parts = micro_batch.parts
    return rows_of(len(parts)) or 0, width_of(max(len(p.blocks) for p in parts))


class Known(NamedTuple):
    """Ids that are on the device alone: part i's is `ids_N[rows[i]]`."""

    ids_N: Tensor
    rows: Seq[int]


class GraphInputs:
    """What the graphs of one size read, on the device, and what of it is there already."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._numbers = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._host = np.zeros((rows, width), np.int32)
        self._written: list[tuple[int, ...]] = [()] * rows

    def put(self, parts: tuple[Part, ...], known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Ids, positions and slots `[3, rows]` int64, and block tables `[rows, width]` int32."""
        spare = len(self._written) - len(parts)
        parts = (*parts, *(parts[:1] * spare))
        numbers = [[p.ids[0] for p in parts], [p.start for p in parts], [p.slot for p in parts]]
        come_from = [0] * len(parts) if known is None else [*known.rows, *([known.rows[0]] * spare)]
        self._send(self._numbers, np.array([*numbers, come_from]))
        if known is not None:
            torch.index_select(known.ids_N, 0, self._numbers[3], out=self._numbers[0])
        # Few sequences get a block in a step, and a table is the same object until its own does.
        changed = [i for i, p in enumerate(parts) if p.blocks is not self._written[i]]
        for i in changed:
            self._host[i, : len(parts[i].blocks)] = parts[i].blocks
        if changed:
            self._send(self._tables, self._host)
        for i in changed:
            self._written[i] = parts[i].blocks
        return self._numbers[:3], self._tables

    def _send(self, to: Tensor, host: npt.NDArray[np.signedinteger]) -> None:
        to.copy_(sendable(torch.from_numpy(host), to.device), non_blocking=True)
