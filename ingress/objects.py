"""The objects that responses in the OpenAI dialect are made of."""

from __future__ import annotations

import time
from typing import Any

from whalepod.ingress.generation import Generation


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
    index: int, finish: str | None, logprobs: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """One of the choices."""
    return {"index": index, **fields, "logprobs": logprobs, "finish_reason": finish}


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An OpenAI error object; what a client sent and no encoding can carry is escaped."""
    return {
        "error": {
            "message": _clean(message),
            "type": kind,
            "param": None if param is None else _clean(param),
            "code": code,
        }
    }


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
