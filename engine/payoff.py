"""Whether drafting pays at the present number of running requests: measured, not assumed."""

from __future__ import annotations

from dataclasses import dataclass, field

# Steps each way before the first verdict, and how seldom the loser is tried again.
_TRIAL, _RETRY, _RETRIAL, _WEIGHT = 8, 96, 4, 0.2


@dataclass(slots=True)
class _Ways:
    """Seconds per token with and without drafts, and how often each was seen."""

    seconds: dict[bool, float] = field(default_factory=dict)
    seen: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    since: int = 0


class Payoff:
    """Chooses the number of drafts for the next step.

    The choice changes how fast tokens come, never which.

    Args:
        drafts: most drafts for a sequence; 0 turns drafting off.
    """

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self._ways: dict[int, _Ways] = {}

    def choose(self, running: int) -> int:
        """How many drafts to verify with `running` sequences in the step."""
        if not self.drafts:
            return 0
        ways = self._ways.setdefault(running.bit_length(), _Ways())
        for way in (True, False):
            if ways.seen[way] < _TRIAL:
                return self.drafts if way else 0
        ways.since = (ways.since + 1) % _RETRY
        best = ways.seconds[True] <= ways.seconds[False]
        retried = ways.since < _RETRIAL
        return self.drafts if best is not retried else 0

    def learn(self, running: int, drafted: bool, seconds: float, tokens: int) -> None:
        """Take a decode step's time in."""
        ways = self._ways.setdefault(running.bit_length(), _Ways())
        each = seconds / max(1, tokens)
        old = ways.seconds.get(drafted, each)
        ways.seconds[drafted] = old + _WEIGHT * (each - old)
        ways.seen[drafted] += 1
