"""One forward pass as the attention layers see it.

Which rows belong to which sequence, and where the state of each lies.

Legend: T tokens of the pass, D decoding sequences (one token each, the first D rows), B blocks of
a sequence's table, E compressed entries, W window, P rotated pairs.

Entry w of a layer with ratio r lies in block `w // per` of its sequence's table, where
`per = block_tokens / r`; raw window keys and compressor rows lie in rings addressed by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whalepod.kernels.attend import Listed, write_ring
from whalepod.kernels.positions import entries_seen
from whalepod.model.layout import Layout, Placed
from whalepod.model.paged import Paged
from whalepod.model.rope import turns

# Rings of all slots, positions of rows, and the rows.
Write = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence.

    Args:
        slot: the sequence's place in the rings.
        start: position of the first new token.
        row: row of that token in the pass.
        count: number of new tokens, at least one.
        blocks: the sequence's block table, long enough for `start + count` tokens.
    """

    slot: int
    start: int
    row: int
    count: int
    blocks: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position after the last new token."""
        return self.start + self.count

    @property
    def rows(self) -> slice:
        """Rows of the pass that belong to this sequence."""
        return slice(self.row, self.row + self.count)


@dataclass(frozen=True, slots=True)
class DecodeView:
    """What all layers of one ratio share for the decoding rows.

    `entries_DE` are flat pool rows of every visible entry, `seen_DE` masks the padding.
    """

    entries_DE: Tensor
    seen_DE: Tensor


@dataclass(slots=True)
class Batch:
    """A forward pass over a ragged batch: decoding sequences first, then prefill chunks.

    State that a re-run of the same pass would still need is not overwritten before `commit`.
    """

    ids_T: Tensor
    positions_T: Tensor
    spans: tuple[Span, ...]
    block_tokens: int
    decoding: int = field(init=False)
    slots_D: Tensor = field(init=False)
    _views: dict[int, DecodeView] = field(init=False, default_factory=dict)
    _turns: dict[int, Tensor] = field(init=False, default_factory=dict)
    _tables: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict)
    _window_turns: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict)
    _seen: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict)
    _blocks: Tensor | None = field(init=False, default=None)
    _writes: dict[int, list[Write]] = field(init=False, default_factory=dict)
    _layout: Layout | None = field(init=False, default=None)
    _entries: dict[int, tuple[Listed, Tensor, bool]] = field(init=False, default_factory=dict)

    _paged: Paged | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Count the decoding spans, which must come first."""
        counts = [span.count for span in self.spans]
        self.decoding = next((i for i, n in enumerate(counts) if n > 1), len(counts))
        slots = torch.tensor([s.slot for s in self.decoders], dtype=torch.int64)
        # A pass without spans may be on its way into a graph, where nothing comes from the host.
        self.slots_D = slots.to(self.ids_T.device) if self.spans else self.ids_T[:0]

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        spans: Sequence[Span],
        block_tokens: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Build a pass from token ids in row order; spans of one token come first."""
        positions = [p for span in spans for p in range(span.start, span.end)]
        return cls(
            torch.tensor(ids, dtype=torch.int64).to(device),
            torch.tensor(positions, dtype=torch.int64).to(device),
            tuple(spans),
            block_tokens,
        )

    @classmethod
    def decode(
        cls,
        ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        table_TB: Tensor,
        block_tokens: int,
    ) -> Batch:
        """One row a sequence, whose places only the device knows: there are no spans.

        Args:
            table_TB: `[T, B]` int32, blocks of each row's sequence.
        """
        batch = cls(ids_T, positions_T, (), block_tokens)
        batch.decoding, batch.slots_D = ids_T.shape[0], slots_T
        batch._paged = Paged.decoding(slots_T, positions_T, table_TB)
        return batch

    @property
    def decoders(self) -> tuple[Span, ...]:
        """The spans of one token."""
        return self.spans[: self.decoding]

    @property
    def chunks(self) -> tuple[Span, ...]:
        """The spans of several tokens (prefill)."""
        return self.spans[self.decoding :]

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids_T.shape[0]

    def turns(self, freqs: Tensor) -> Tensor:
        """Rotations of this pass's positions, `[T, P]`, computed once per frequency table."""
        found = self._turns.get(id(freqs))
        if found is None:
            found = self._turns[id(freqs)] = turns(self.positions_T, freqs)
        return found

    @property
    def layout(self) -> Layout:
        """Where all rows belong, made once per pass."""
        if self._layout is None:
            self._layout = Layout(self._placed, self.positions_T, self.block_tokens)
        return self._layout

    @property
    def paged(self) -> Paged:
        """Where all rows belong, for kernels that read block tables; made once per pass."""
        if self._paged is None:
            self._paged = Paged.of(self._placed, self.ids_T.device)
        return self._paged

    @property
    def _placed(self) -> list[Placed]:
        return [(s.slot, s.start, s.row, s.count, s.blocks) for s in self.spans]

    def entries(self, ratio: int) -> tuple[Listed, Tensor, bool]:
        """See `Layout.entries`; made once per pass."""
        found = self._entries.get(ratio)
        if found is None:
            found = self._entries[ratio] = self.layout.entries(ratio)
        return found

    def window_turns(self, freqs: Tensor, ratio: int) -> Tensor:
        """Rotations of the first position of each row's window, `[T, P]`."""
        key = (id(freqs), ratio)
        found = self._window_turns.get(key)
        if found is None:
            found = self._window_turns[key] = turns(self.positions_T, freqs, ratio)
        return found

    def seen(self, ratio: int, most: int) -> Tensor:
        """How many entries of `ratio` each row sees, at most `most`, `[T]` int32; made once per pass."""
        found = self._seen.get((ratio, most))
        if found is None:
            found = self._seen[ratio, most] = entries_seen(self.positions_T, ratio, most)
        return found

    @property
    def blocks_D(self) -> Tensor:
        """The block that each decoding row's position belongs to, `[D]`."""
        if self._blocks is None:
            table = self.paged.table_SB[: self.decoding].long()
            own = self.positions_T[: self.decoding] // self.block_tokens
            self._blocks = table.gather(1, own.unsqueeze(1)).squeeze(1)
        return self._blocks

    def decode_view(self, ratio: int) -> DecodeView:
        """Index tensors of the decoding rows for layers of `ratio`, computed once per pass."""
        found = self._views.get(ratio)
        if found is None:
            found = self._views[ratio] = self._make_view(ratio)
        return found

    def entry_rows(self, span: Span, ratio: int, first: int, stop: int) -> Tensor:
        """Flat pool rows of entries `first .. stop-1` of one sequence, `[stop - first]`."""
        return self.table(span, ratio)[first:stop]

    def table(self, span: Span, ratio: int) -> Tensor:
        """Flat pool rows of all entries a sequence has room for, in order; made once per pass."""
        key = (span.row, ratio)
        found = self._tables.get(key)
        if found is None:
            per = self.block_tokens // ratio
            blocks = torch.tensor(span.blocks, dtype=torch.int64).unsqueeze(-1)
            found = (blocks * per + torch.arange(per)).flatten().to(self.ids_T.device)
            self._tables[key] = found
        return found

    def write_later(self, slot: int, rings: Tensor, positions: Tensor, values: Tensor) -> None:
        """Note rows for the `commit` of the sequence in `slot`.

        Args:
            rings: `[N, R, ...]`, one ring a slot, addressed by position modulo R.
            positions: of all rows of the sequence's span, ascending.
            values: one row a position.
        """
        self._writes.setdefault(slot, []).append((rings, positions, values))

    def commit(self, slot: int | None = None, rows: int | None = None) -> None:
        """Make the pass's state visible, of one sequence or of all.

        Running the pass again before this gives the same bits.

        Args:
            rows: the first so many rows of the span only; the others were drafts and are wrong.
                Entries that they closed are written again before any query sees them.
        """
        for which in [slot] if slot is not None else list(self._writes):
            self._write(self._writes.pop(which, []), which, rows)

    def keep(self, slot: int, rows: int, into: int) -> None:
        """Write what `commit` of so many rows would, but into the rings of another slot."""
        self._write(self._writes.get(slot, []), into, rows)

    @staticmethod
    def _write(writes: list[Write], slot: int, rows: int | None) -> None:
        for rings, positions, values in writes:
            stop, size = len(values) if rows is None else rows, rings.shape[1]
            first = max(0, stop - size)
            if stop > first:
                write_ring(rings, slot, int(positions[first]), values[first:stop])

    def _make_view(self, ratio: int) -> DecodeView:
        per = self.block_tokens // ratio
        spans, device = self.decoders, self.ids_T.device
        seen = [(s.start + 1) // ratio for s in spans]
        most = max(seen, default=0)
        width = -(-most // per)
        table = torch.tensor(
            [[*s.blocks[:width], *([0] * (width - len(s.blocks)))] for s in spans],
            dtype=torch.int64,
        ).view(len(spans), width)
        rows = (table.unsqueeze(-1) * per + torch.arange(per)).flatten(1)[:, :most]
        return DecodeView(
            entries_DE=rows.to(device),
            seen_DE=(torch.arange(most) < torch.tensor(seen).unsqueeze(-1)).to(device),
        )
