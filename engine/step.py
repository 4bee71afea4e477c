"""One forward pass, frozen: which tokens of which sequences, and what to sample after it."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch

from whalepod.engine.request import Adjust, Grammar, Sampling
from whalepod.model.batch import Batch, Span


class Part(NamedTuple):
    """New tokens of one sequence in a step.

    `draw` holds (settings, position) when the last token's logits give the next token, and is
    None for a chunk that does not reach the end of the known tokens. The last `drafts` ids are
    guesses: each of their rows draws as well, at the position after the one before. `restore` is
    the snapshot its slot starts from (-1: none) and `keep` lists the snapshots to take: after so
    many of its rows, into that slot. `history` holds the number of prompt tokens and all tokens
    before the first draw, for settings that depend on them. `tell` asks for log-probabilities of
    prompt tokens: the first row that has to tell of one, those tokens, and how many alternatives.
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    draw: tuple[Sampling, int] | None
    drafts: int = 0
    restore: int = -1
    keep: tuple[tuple[int, int], ...] = ()
    history: tuple[int, tuple[int, ...]] | None = None
    tell: tuple[int, tuple[int, ...], int] | None = None

    def emitted(self, drawn: Seq[int]) -> list[int]:
        """The tokens this part yields: as many of its draws as rest on right guesses.

        Args:
            drawn: the token drawn after the last known id, and after each draft.
        """
        guesses = self.ids[len(self.ids) - self.drafts :]
        right = 0
        while right < self.drafts and guesses[right] == drawn[right]:
            right += 1
        return list(drawn[: right + 1])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Parts that travel together; single tokens first, as `Batch` wants them."""

    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Rows of the pass."""
        return sum(len(part.ids) for part in self.parts)

    def batch(self, block_tokens: int, device: torch.device | str = "cpu") -> Batch:
        """Lay the parts out as rows."""
        spans, row = [], 0
        for part in self.parts:
            spans.append(Span(part.slot, part.start, row, len(part.ids), part.blocks))
            row += len(part.ids)
        ids = [token for part in self.parts for token in part.ids]
        return Batch.of(ids, spans, block_tokens, device)

    def last_rows(self) -> list[int]:
        """Rows that draw: of every part's last known token, and of its drafts."""
        rows: list[int] = []
        end = 0
        for part in self.parts:
            end += len(part.ids)
            if part.draw is not None:
                rows += range(end - 1 - part.drafts, end)
        return rows

    def tells(self) -> list[tuple[int, tuple[int, ...], int]]:
        """As `tell` of every part that asks, with rows of the whole pass."""
        found, at = [], 0
        for part in self.parts:
            if part.tell is not None:
                first, tokens, count = part.tell
                found.append((at + first, tokens, count))
            at += len(part.ids)
        return found

    def histories(self) -> list[tuple[int, tuple[int, ...]] | None]:
        """What was known before each draw, in the order of `draws`."""
        found: list[tuple[int, tuple[int, ...]] | None] = []
        for part in (p for p in self.parts if p.draw is not None):
            guesses = part.ids[len(part.ids) - part.drafts :] if part.drafts else ()
            for i in range(1 + part.drafts):
                known = part.history
                found.append(known and (known[0], known[1] + guesses[:i]))
        return found

    def draws(self) -> list[tuple[Sampling, int]]:
        """Settings and positions, in the order of `last_rows`."""
        return [
            (part.draw[0], part.draw[1] + i)
            for part in self.parts
            if part.draw is not None
            for i in range(1 + part.drafts)
        ]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one attention replica, as one or more micro-batches."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def tokens(self) -> int:
        """Rows over all micro-batches."""
        return sum(m.tokens for m in self.micro_batches)

    def to_bytes(self) -> bytes:
        """Encode for the next pipeline stage (JSON; settings by value)."""
        return json.dumps(
            [
                [
                    [
                        *(p.slot, p.start, p.ids, p.blocks),
                        *(p.draw and _plain(p.draw), p.drafts, p.restore, p.keep, p.history),
                        p.tell,
                    ]
                    for p in m.parts
                ]
                for m in self.micro_batches
            ],
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Step:
        """Decode what `to_bytes` made."""
        return cls(
            tuple(
                MicroBatch(
                    tuple(
                        Part(
                            *(slot, start, tuple(ids), tuple(blocks)),
                            *(draw and _settings(draw), drafts, restore),
                            tuple((after, snapshot) for after, snapshot in keep),
                            history and (history[0], tuple(history[1])),
                            tell and (tell[0], tuple(tell[1]), tell[2]),
                        )
                        for slot, start, ids, blocks, draw, drafts, restore, keep, history, tell in (
                            parts
                        )
                    )
                )
                for parts in json.loads(data)
            )
        )


def _plain(draw: tuple[Sampling, int]) -> list[Any]:
    settings, position = draw
    return [astuple(settings), position]


def _settings(draw: list[Any]) -> tuple[Sampling, int]:
    (temperature, top_p, top_k, seed, min_p, adjust, alternatives), position = draw
    wanted = adjust and _adjust(adjust)
    return Sampling(temperature, top_p, top_k, seed, min_p, wanted, alternatives), position


def _adjust(values: list[Any]) -> Adjust:
    presence, frequency, repetition, bias, allowed, banned, least, stops, grammar = values
    pairs = tuple((token, value) for token, value in bias)
    rest = tuple(allowed), tuple(banned), least, tuple(stops), grammar and Grammar(*grammar)
    return Adjust(presence, frequency, repetition, pairs, *rest)


def split(parts: Seq[Part], count: int) -> Step:
    """Spread parts over at most `count` micro-batches of about equal token counts."""
    count = max(1, min(count, len(parts)))
    groups: list[list[Part]] = [[] for _ in range(count)]
    loads = [0] * count
    for part in sorted(parts, key=lambda p: -len(p.ids)):
        lightest = loads.index(min(loads)) if count > 1 else 0
        groups[lightest].append(part)
        loads[lightest] += len(part.ids)
    return Step(tuple(MicroBatch(tuple(sorted(g, key=_is_chunk))) for g in groups if g))


def _is_chunk(part: Part) -> bool:
    return len(part.ids) > 1
