"""The objects that responses in the OpenAI dialect are made of."""

from __future__ import annotations

import time
from typing import Any

from whalepod.ingress.service import Generation


def usage(generation: Generation) -> dict[str, Any]:
    """The `usage` object."""
    used = generation.usage
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": used.accepted_tokens,
            "rejected_prediction_tokens": used.drafted_tokens - used.accepted_tokens,
        },
    }


def envelope(kind: str, prefix: str, generation: Generation, model: str) -> dict[str, Any]:
    """The fields every response and chunk begins with."""
    return {
        "id": f"{prefix}-{generation.id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def choice(
    finish: str | None, logprobs: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """A choice with index 0."""
    return {"index": 0, **fields, "logprobs": logprobs, "finish_reason": finish}
