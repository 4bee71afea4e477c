"""Choose the next token: a pure function of (logits, settings, seed, position).

Nothing is remembered between calls, so a replayed or migrated request goes on with the same
tokens wherever it runs. Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.engine.adjust import adjusted, constrained
from whalepod.engine.grammar import Grammars
from whalepod.engine.request import Sampling
from whalepod.engine.upload import Coming, upload
from whalepod.kernels import sample as kernels
from whalepod.kernels.draw import best_tokens, ranked

_MASK = (1 << 64) - 1
# Tokens with their log-probabilities, the most probable first.
Alternatives = tuple[tuple[int, float], ...]


def uniform(seed: int, position: int) -> float:
    """Return a number in `[0, 1)` that depends on both arguments alone (splitmix64, 53 bits)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


class Drawn(NamedTuple):
    """A token, and its log-probability under the unmodified logits.

    Token -1: there is none. Its grammar took more work than its limits allow, or, where `logprob` is
    not finite, the logits hold no distribution.
    """

    token: int
    logprob: float
    alternatives: Alternatives = ()


# How many tokens are the prompt, and all tokens before a draw.
History = tuple[int, tuple[int, ...]]


def sample(
    logits_NV: Tensor,
    settings: Seq[Sampling],
    positions: Seq[int],
    histories: Seq[History | None] | None = None,
    grammars: Grammars | None = None,
) -> list[Drawn]:
    """Draw one token a row.

    Args:
        logits_NV: `[N, V]` fp32.
        settings: one a row.
        positions: index of the drawn token in its sequence, one a row.
        histories: the tokens before it, where the settings ask for them (`adjust`).
        grammars: where some of them have a grammar.

    Returns:
        one `Drawn` a row. Greedy ties go to the lowest id.
    """
    drawn = _draw_all(logits_NV, settings, positions, histories, grammars)
    if not any(s.alternatives for s in settings):
        return drawn
    return [
        d._replace(alternatives=best(logits_NV[i], s.alternatives)) if s.alternatives else d
        for i, (d, s) in enumerate(zip(drawn, settings, strict=True))
    ]


def _sound(drawn: list[Drawn]) -> list[Drawn]:
    """Without tokens from logits that a NaN or an infinity has spoilt."""
    return [d if math.isfinite(d.logprob) else d._replace(token=-1) for d in drawn]


def best(logits_V: Tensor, count: int) -> Alternatives:
    """The most probable tokens with their log-probabilities; among equals the lowest id first."""
    ids = ranked(logits_V)[:count]
    values = logits_V[ids] - best_tokens(logits_V.unsqueeze(0))[1]
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _draw_all(
    logits_NV: Tensor,
    settings: Seq[Sampling],
    positions: Seq[int],
    histories: Seq[History | None] | None,
    grammars: Grammars | None,
) -> list[Drawn]:
    plain = [i for i, s in enumerate(settings) if s.adjust is None]
    if logits_NV.device.type == "cuda" and plain:
        return _mostly_on_device(logits_NV, settings, positions, histories, plain, grammars)
    best_N, norm_N = best_tokens(logits_NV)
    greedy = best_N.tolist()
    tokens = []
    for i, s in enumerate(settings):
        row = None
        if s.adjust is not None:
            history = histories[i] if histories else None
            assert history is not None
            row = adjusted(logits_NV[i], s.adjust, *history)
            if s.adjust.grammar is not None:
                assert grammars is not None
                allowed_V = grammars.allowed(s, history[1][history[0] :])
                if allowed_V is None:
                    tokens.append(-1)
                    continue
                row = constrained(row, logits_NV[i], allowed_V)
        if s.temperature == 0:
            tokens.append(greedy[i] if row is None else int(row.argmax()))
        else:
            tokens.append(draw(logits_NV[i] if row is None else row, s, positions[i]))
    at = torch.tensor(tokens, device=logits_NV.device).clamp(min=0).unsqueeze(-1)
    chosen = logits_NV.gather(1, at).squeeze(1) - norm_N
    return _sound([Drawn(t, p) for t, p in zip(tokens, chosen.tolist(), strict=True)])


def _mostly_on_device(
    logits_NV: Tensor,
    settings: Seq[Sampling],
    positions: Seq[int],
    histories: Seq[History | None] | None,
    plain: list[int],
    grammars: Grammars | None,
) -> list[Drawn]:
    """Draw the `plain` rows in one kernel; those that their history adjusts one by one."""
    if len(plain) == len(settings):
        return _on_device(logits_NV, settings, positions)
    others = [i for i in range(len(settings)) if settings[i].adjust is not None]
    some = _on_device(logits_NV[plain], [settings[i] for i in plain], [positions[i] for i in plain])
    rest = _draw_all(
        logits_NV[others],
        [settings[i] for i in others],
        [positions[i] for i in others],
        [histories[i] for i in others] if histories else None,
        grammars,
    )
    drawn = dict(zip([*plain, *others], [*some, *rest], strict=True))
    return [drawn[i] for i in range(len(settings))]


def _on_device(logits_NV: Tensor, settings: Seq[Sampling], positions: Seq[int]) -> list[Drawn]:
    return Draws(logits_NV, settings, positions).take()


class Draws:
    """Draws by settings without `adjust` and `alternatives`, under way on the device of the logits.

    Attributes:
        tokens_N: `[N]` int64, on that device.
    """

    def __init__(self, logits_NV: Tensor, settings: Seq[Sampling], positions: Seq[int]) -> None:
        rows = [settings_row(s, p) for s, p in zip(settings, positions, strict=True)]
        numbers = upload(torch.tensor(rows, dtype=torch.float64), logits_NV.device)
        filtered = any(s.top_k or s.top_p < 1 for s in settings)
        self.tokens_N, logprobs_N = kernels.sample(logits_NV, numbers, filtered)
        self._coming = Coming(self.tokens_N, logprobs_N)

    def take(self) -> list[Drawn]:
        """Wait for them."""
        return _sound([Drawn(*d) for d in zip(*self._coming.take(), strict=True)])


def settings_row(settings: Sampling, position: int) -> tuple[float, float, float, float, float]:
    """A row of `kernels.sample.sample`'s settings."""
    least = math.log(settings.min_p) if settings.min_p else float("-inf")
    return (
        settings.temperature,
        settings.top_k,
        settings.top_p,
        least,
        uniform(settings.seed, position) if settings.temperature else 0.0,
    )


def draw(logits_V: Tensor, settings: Sampling, position: int) -> int:
    """Draw from one row: temperature, then min-p, top-k, top-p, then inverse transform.

    In fp64; equal logits give equal tokens (`kernels.sample`).
    """
    return kernels.draw_row(logits_V, *settings_row(settings, position))
