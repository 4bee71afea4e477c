"""How much may wait on an attention member, and when to come back when more cannot."""

from __future__ import annotations

from dataclasses import dataclass

from whalepod.errors import Overloaded

# Work older than this counts half; and what is said to those who are turned away.
_HALF_LIFE_S, _LEAST_S, _MOST_S = 30.0, 1.0, 600.0


@dataclass(slots=True)
class Pace:
    """What a member gets done, measured over its last minute of work; idle time does not count."""

    seconds: float = 0.0
    requests: float = 0.0
    tokens: float = 0.0

    def learn(self, seconds: float, requests: int, tokens: int) -> None:
        """Take in a stretch of work.

        Args:
            requests: how many ended in it, however they did.
            tokens: how many tokens of prompts were computed in it.
        """
        fade = 0.5 ** (seconds / _HALF_LIFE_S)
        self.seconds = self.seconds * fade + seconds
        self.requests = self.requests * fade + requests
        self.tokens = self.tokens * fade + tokens

    def seconds_for(self, requests: int, tokens: int) -> float:
        """Time until so many requests have ended and so many prompt tokens are computed, s.

        Where none has ended yet, one is assumed to end now: the time grows as long as nothing does.
        """
        by_requests = requests * self.seconds / max(1.0, self.requests)
        by_tokens = tokens * self.seconds / max(1.0, self.tokens)
        return min(_MOST_S, max(_LEAST_S, by_requests, by_tokens))


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait.

    Args:
        requests: that have no slot yet.
        tokens: of prompts that are not computed yet. One prompt alone may be longer.
    """

    requests: int
    tokens: int

    def check(self, waiting: int, backlog: int, prompt: int, pace: Pace) -> None:
        """Raise Overloaded if a prompt of so many tokens cannot wait as well.

        Args:
            waiting: requests that wait.
            backlog: tokens of prompts that are not computed yet.
        """
        requests = waiting + 1 - self.requests
        tokens = min(backlog, backlog + prompt - self.tokens)
        if requests <= 0 and tokens <= 0:
            return
        seconds = pace.seconds_for(max(0, requests), max(0, tokens))
        what = (
            f"{waiting} requests wait and the limit is {self.requests} (engine.max_queue)"
            if requests > 0
            else f"{backlog} prompt tokens wait, this request has {prompt} more, and the limit is "
            f"{self.tokens} (engine.max_queue_tokens)"
        )
        raise Overloaded(f"{what}; send it again in {seconds:.0f} s", seconds)
