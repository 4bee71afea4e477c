"""What a request asks for beside one text: several choices, its prompt back, what is told of it."""

from __future__ import annotations

from pydantic import BaseModel, Field

from whalepod.errors import RequestError
from whalepod.ingress.options import MAX_CHOICES, MAX_LOGPROBS


class Outputs(BaseModel):
    """Fields that completions and chat share."""

    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


def prompt_count(prompt_logprobs: int | None, echo: bool, logprobs: int | None) -> int | None:
    """Alternatives that the engine has to tell of prompt tokens; None: nothing."""
    asked = (prompt_logprobs, logprobs if echo else None)
    return max((count for count in asked if count is not None), default=None)


def check_max_tokens(max_tokens: int | None, prompt_wanted: bool) -> None:
    """Raise RequestError where neither text nor anything of the prompt is asked for."""
    if max_tokens == 0 and not prompt_wanted:
        raise RequestError(
            "max_tokens is 0, so there is nothing to answer; expected at least 1, or echo or "
            "prompt_logprobs beside it",
            "max_tokens",
        )


def check_best_of(best_of: int | None, n: int | None) -> None:
    """Raise RequestError where more choices are to be made than are to be returned."""
    if best_of is not None and best_of != (n or 1):
        raise RequestError(
            f"best_of is {best_of} and n is {n or 1}; choices are not ranked here, so they have to "
            "be equal: leave best_of out",
            "best_of",
        )
