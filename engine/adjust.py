"""Change a row of logits as a request asks, before a token is chosen.

A pure function of the logits, the settings and the request's own tokens, so that a replayed,
preempted or verified request gets what it would have got. Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.engine.request import Adjust


def adjusted(logits_V: Tensor, wanted: Adjust, prompt_tokens: int, tokens: Seq[int]) -> Tensor:
    """Return a changed copy of `logits_V`.

    In this order: bias, then the ids that may not come, then penalties. Presence and frequency
    penalties are OpenAI's and count generated tokens; the repetition penalty is that of
    Hugging Face (positive logits divided, negative ones multiplied) and counts the prompt as well.

    Args:
        logits_V: `[V]` fp32.
        prompt_tokens: how many of `tokens` are the prompt.
        tokens: the prompt and all that was generated before this draw.
    """
    row = logits_V.clone()
    if wanted.bias:
        ids = _ids([token for token, _ in wanted.bias], row)
        row.index_add_(0, ids, torch.tensor([value for _, value in wanted.bias]).to(row))
    if wanted.allowed:
        kept = _ids(wanted.allowed, row)
        row = torch.full_like(row, float("-inf")).index_copy_(0, kept, row[kept])
    banned = wanted.banned
    if len(tokens) - prompt_tokens < wanted.min_tokens:
        banned += wanted.stop_ids
    if banned:
        row[_ids(banned, row)] = float("-inf")
    if wanted.repetition != 1 and tokens:
        seen = _ids(sorted(set(tokens)), row)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / wanted.repetition, values * wanted.repetition)
    generated = tokens[prompt_tokens:]
    if generated and (wanted.presence or wanted.frequency):
        seen, counts = torch.tensor(generated, device=row.device).unique(return_counts=True)
        row[seen] -= wanted.presence + wanted.frequency * counts
    return row


def constrained(row_V: Tensor, logits_V: Tensor, allowed_V: Tensor) -> Tensor:
    """Return a copy of `row_V` where only what a grammar allows may come.

    When the other settings forbid all of it, they give way: then it is that of `logits_V`.

    Args:
        row_V: `[V]` fp32, already `adjusted`. logits_V: before that.
        allowed_V: `[V]` bool, at least one True.
    """
    never = ~allowed_V.to(row_V.device)
    row = row_V.masked_fill(never, float("-inf"))
    if row.max() == float("-inf"):
        row = logits_V.masked_fill(never, float("-inf"))
    return row


def _ids(ids: Seq[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device)
