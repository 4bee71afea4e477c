"""Drafts of the next tokens by the MTP block, on the member that samples.

Drafts decide nothing: a step verifies them with the model's own draw at every position, so the
tokens are those it would have given without. The block has a window and no entries, and its experts
lie here as well, so drafting needs no other member.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.engine.step import MicroBatch, Part
from whalepod.kernels.linear import linear_wide
from whalepod.model.batch import Batch, Span
from whalepod.model.cache import Cache
from whalepod.model.gate import Gate
from whalepod.model.moe import Table, mixture
from whalepod.model.mtp import MTP
from whalepod.model.shape import ModelConfig


class Drafter:
    """The MTP block with its state for every slot.

    Args:
        mtp, gate, experts: the block. embedding, head: the main model's tables, `[V, D]`.
        slots: sequences that run at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        mtp: MTP,
        gate: Gate,
        experts: Table,
        embedding: Tensor,
        head: Tensor,
        *,
        slots: int,
    ) -> None:
        self.config, self.mtp, self.gate, self.experts = config, mtp, gate, experts
        self.embedding, self.head = embedding, head
        layers = range(mtp.layer, mtp.layer + 1)
        self.cache = Cache(
            config, layers, slots=slots, blocks=1, dtype=embedding.dtype, device=embedding.device
        )
        # The stream of a chunk's last row waits here for the token that follows it.
        self._waiting: dict[int, tuple[int, Tensor]] = {}

    def propose(
        self,
        micro_batch: MicroBatch,
        x_TCD: Tensor,
        emitted: dict[int, list[int]],
        count: int,
    ) -> dict[int, list[int]]:
        """Take a verified pass in and draft what may come after it.

        Args:
            x_TCD: its streams after the last layer.
            emitted: the tokens each slot that drew has been given by this pass, in order.
            count: drafts for each of those slots.

        Returns:
            `count` tokens for each slot of `emitted`.
        """
        rows = _Rows()
        row = 0
        for part in micro_batch.parts:
            self._take(part, x_TCD[row : row + len(part.ids)], emitted.get(part.slot), rows)
            row += len(part.ids)
        if not rows.spans:
            return {}
        z_TCD, batch = self._run(rows.streams, rows.following, rows.spans)
        last = {span.slot: (span.end, z_TCD[span.rows.stop - 1]) for span in batch.spans}
        drafts: dict[int, list[int]] = {slot: [] for slot in emitted if slot in last}
        slots = list(drafts)
        if not slots:
            return {}
        z_TCD = torch.stack([last[slot][1] for slot in slots])
        for step in range(count):
            tokens = linear_wide(self.mtp.collapse(z_TCD), self.head).argmax(-1).tolist()
            for slot, token in zip(slots, tokens, strict=True):
                drafts[slot].append(token)
            if step + 1 < count:
                spans = [(slot, last[slot][0] + step, 1) for slot in slots]
                z_TCD, _ = self._run(list(z_TCD.split(1)), tokens, spans)
        return drafts

    def _take(self, part: Part, x_TCD: Tensor, given: list[int] | None, rows: _Rows) -> None:
        """Line a part's rows up with the tokens that follow them."""
        known = len(part.ids) - part.drafts
        kept = known + (len(given) - 1 if given else 0)
        following = [*part.ids[1:known], *(given or ())]
        streams, start = x_TCD[:kept], part.start
        waiting = self._waiting.pop(part.slot, None)
        if waiting is not None and waiting[0] == start - 1:
            start, streams = waiting[0], torch.cat([waiting[1], streams])
            following.insert(0, part.ids[0])
        if given is None:
            self._waiting[part.slot] = (start + len(streams) - 1, streams[-1:].clone())
            streams = streams[:-1]
        # No later query sees further back than the window.
        skipped = max(0, len(streams) - self.config.sliding_window)
        if len(streams) > skipped:
            rows.add(part.slot, start + skipped, streams[skipped:], following[skipped:])

    def _run(
        self, streams: list[Tensor], following: list[int], spans: list[tuple[int, int, int]]
    ) -> tuple[Tensor, Batch]:
        """Run the block; spans of one row come first, as `Batch` wants them."""
        starts, at = [], 0
        for _, _, count in spans:
            starts.append(at)
            at += count
        order = sorted(range(len(spans)), key=lambda i: spans[i][2] > 1)
        ids: list[int] = []
        placed = []
        for i in order:
            slot, start, count = spans[i]
            placed.append(Span(slot, start, len(ids), count, ()))
            ids += following[starts[i] : starts[i] + count]
        device = self.embedding.device
        batch = Batch.of(ids, placed, self.cache.block_tokens, device)
        z_TCD = torch.cat([streams[i] for i in order])
        z_TCD = self.mtp.join(z_TCD, self.embedding[batch.ids_T])
        block = self.mtp.block
        half = block.before(z_TCD, batch, self.cache.layers[self.mtp.layer])
        routes = self.gate.route(half.ffn_in_TD, batch.ids_T)
        routed = mixture(half.ffn_in_TD, routes, self.experts)
        z_TCD = block.after(half, routed, block.share(half))
        batch.commit()
        return z_TCD, batch


class _Rows:
    """Rows for one run of the block, sequence by sequence."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []
        self.following: list[int] = []
        self.spans: list[tuple[int, int, int]] = []

    def add(self, slot: int, start: int, streams: Tensor, following: Seq[int]) -> None:
        """Add rows of one sequence with the token after each."""
        self.streams.append(streams)
        self.following += following
        self.spans.append((slot, start, len(streams)))
