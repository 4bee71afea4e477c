"""A step that is to be run, and the sequences behind its parts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from whalepod.engine.request import Sequence
from whalepod.engine.sampler import Drawn
from whalepod.engine.step import Part, Step


@dataclass(slots=True)
class Plan:
    """A step and the sequences behind its parts.

    Args:
        rows: of a step that was planned before the one before it had been drawn (`foresight`): which of that
            one's draws is the id of each part.
    """

    step: Step
    planned: list[tuple[Sequence, Part]]
    running: int = 0
    drafts: int = 0
    rows: tuple[int, ...] = ()
    begun: float = field(default_factory=time.perf_counter)
    by_slot: dict[int, Sequence] = field(init=False)

    def __post_init__(self) -> None:
        """Index by slot."""
        self.by_slot = {part.slot: sequence for sequence, part in self.planned}

    @property
    def here(self) -> list[tuple[Sequence, Part]]:
        """Those that have not ended since: of a step that was foreseen, some may have."""
        return [(s, part) for s, part in self.planned if s.slot == part.slot]

    @property
    def verifies(self) -> bool:
        """Whether any part has drafts."""
        return any(part.drafts for _, part in self.planned)

    def emitted(self, drawn: list[Drawn]) -> dict[int, list[Drawn]]:
        """What each slot yields: of the draws after its drafts, those that rest on right ones.

        Args:
            drawn: in the order of the parts that draw, one for a part and each of its drafts.
        """
        rest, found = iter(drawn), dict[int, list[Drawn]]()
        for micro_batch in self.step.micro_batches:
            for part in micro_batch.parts:
                if part.draw is None:
                    continue
                got = [next(rest)]
                if part.drafts:
                    got += [next(rest) for _ in range(part.drafts)]
                    got = got[: len(part.emitted([d.token for d in got]))]
                    self.by_slot[part.slot].tally.drafted = part.drafts
                if self.by_slot[part.slot].slot == part.slot:
                    found[part.slot] = got
        return found
