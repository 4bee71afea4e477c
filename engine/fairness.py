"""Who goes first, and how the rows of one step are shared among the sequences that run.

Decodes come first, each with one row; where prefills run as well, a quarter of the budget is theirs,
and decodes that find no row left are the first of the next step. Prefills share what remains: half
goes to the one that came first, so that a long prompt always goes on; the other half to the one
with the least left, so that a short prompt never stands behind long ones.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import groupby

from whalepod.engine.request import Sequence

_PREFILL_PART = 4


def rank(sequence: Sequence) -> tuple[int, int]:
    """Sorts sequences: the lowest priority number first, then the order of arrival."""
    return sequence.request.priority, sequence.arrived


def divide(
    running: Seq[Sequence], budget: int, guesses: Callable[[Sequence], int]
) -> dict[Sequence, int]:
    """Divide a step's rows.

    Args:
        running: in the order of `rank`.
        budget: rows of the step, at least one.
        guesses: how many drafts a decode would have verified, beside its one row.

    Returns:
        rows for each sequence that gets some.
    """
    prefills = [s for s in running if s.pending > 1]
    reserved = budget // _PREFILL_PART if prefills else 0
    turns = sorted(
        (s for s in running if s.pending == 1), key=lambda s: (s.request.priority, s.served)
    )
    decodes = turns[: budget - reserved]
    spare = budget - reserved - len(decodes)
    rows: dict[Sequence, int] = {}
    for sequence in decodes:
        drafts = min(guesses(sequence), spare)
        rows[sequence] = 1 + drafts
        spare -= drafts
    return rows | share(prefills, reserved + spare)


def share(prefills: Seq[Sequence], budget: int) -> dict[Sequence, int]:
    """Divide rows among prefills, in the order of `rank`; a better priority takes all it can."""
    rows: dict[Sequence, int] = {}
    for _, group in groupby(prefills, key=lambda s: s.request.priority):
        equals = list(group)
        budget -= _take(rows, equals[:1], (budget + 1) // 2)
        by_rest = sorted(equals, key=lambda s: s.pending - rows.get(s, 0))
        budget -= _take(rows, by_rest, budget)
    return rows


def _take(rows: dict[Sequence, int], order: Seq[Sequence], budget: int) -> int:
    """Hand out up to `budget` rows in this order; returns how many were."""
    left = budget
    for sequence in order:
        had = rows.get(sequence, 0)
        got = min(sequence.pending - had, left)
        if got > 0:
            rows[sequence] = had + got
            left -= got
    return budget - left
