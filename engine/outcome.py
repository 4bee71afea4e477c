"""What a pass yields at the end of the model: drawn tokens, and what is told of prompts.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.engine.attention import AttentionStage
from whalepod.engine.prompt import PromptLogprobs, score
from whalepod.engine.sampler import Drawn, sample
from whalepod.engine.step import MicroBatch

# Rows of prompts whose logits exist at the same time: 128 rows of DeepSeek's vocabulary are 66 MB.
_ROWS_AT_ONCE = 128


def outcome(
    stage: AttentionStage, x: Seq[Tensor], micro_batches: Seq[MicroBatch]
) -> tuple[list[Drawn], list[PromptLogprobs]]:
    """Sample from the last stage's streams, and tell of prompts what is asked.

    Args:
        x: `[T, C, D]`, one a micro-batch.

    Returns:
        what was drawn, in the order of the parts that draw; what is told, of those that tell.
    """
    return draw(stage, x, micro_batches), [
        told
        for x_TCD, micro_batch in zip(x, micro_batches, strict=True)
        for told in tell(stage, x_TCD, micro_batch)
    ]


def draw(stage: AttentionStage, x: Seq[Tensor], micro_batches: Seq[MicroBatch]) -> list[Drawn]:
    """Sample from the last stage's streams, in the order of the parts that draw."""
    drawn: list[Drawn] = []
    for x_TCD, micro_batch in zip(x, micro_batches, strict=True):
        rows = micro_batch.last_rows()
        if rows:
            drawn += draw_from(stage, stage.logits(x_TCD, rows), micro_batch)
    return drawn


def draw_from(stage: AttentionStage, logits: Tensor, micro_batch: MicroBatch) -> list[Drawn]:
    """Sample from the logits of all rows that draw."""
    settings, positions = zip(*micro_batch.draws(), strict=True)
    return sample(logits, settings, positions, micro_batch.histories(), stage.grammars)


def tell(stage: AttentionStage, x_TCD: Tensor, micro_batch: MicroBatch) -> list[PromptLogprobs]:
    """What is told of prompts, by part that tells; few rows' logits exist at the same time."""
    asked = micro_batch.tells()
    rows = [row for first, tokens, _ in asked for row in range(first, first + len(tokens))]
    tokens = [token for _, some, _ in asked for token in some]
    most = max((count for _, _, count in asked), default=0)
    scored = []
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = slice(at, at + _ROWS_AT_ONCE)
        wanted = torch.tensor(tokens[some], dtype=torch.int64, device=x_TCD.device)
        scored.append(score(stage.logits(x_TCD, rows[some]), wanted, most))
    whole, at, found = PromptLogprobs.join(scored, most), 0, []
    for _, some_tokens, count in asked:
        found.append(whole.cut(at, at + len(some_tokens), count))
        at += len(some_tokens)
    return found
