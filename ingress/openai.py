"""The OpenAI dialect: request bodies checked to the letter, response objects built by hand."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from whalepod.errors import RequestError
from whalepod.ingress.service import Generation, Options
from whalepod.model.chat import Message

MAX_STOPS = 16


class Body(BaseModel):
    """Unknown fields are errors, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = False


class Thinking(Body):
    """DeepSeek's switch between the reasoning modes."""

    type: Literal["enabled", "disabled"]


_StopText = Annotated[str, Field(min_length=1)]


class Common(Body):
    """Fields that completions and chat share."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: Literal[1] | None = None
    user: str | None = None
    return_token_ids: bool = False
    # Accepted at the values that ask for nothing, since clients send them as defaults.
    presence_penalty: Literal[0] | float | None = None
    frequency_penalty: Literal[0] | float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _not_yet(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported yet; leave it out or send 0")
        return value

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, max_tokens: int | None) -> Options:
        """The settings with defaults filled in."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Options(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(Common):
    """`POST /v1/completions`."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: None = None

    def single_prompt(self) -> str | list[int]:
        """The prompt; a list of one string counts as that string."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            return prompt[0]
        assert not isinstance(prompt, list) or not any(isinstance(p, str) for p in prompt)
        return prompt  # type: ignore[return-value]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    reasoning_content: str | None = None
    prefix: bool = False
    name: str | None = None

    def plain(self) -> Message:
        """The message for rendering."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return Message(self.role, content, self.reasoning_content or "", self.prefix)


class ChatBody(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    thinking: Thinking | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    response_format: None = None
    reasoning_effort: None = None

    def is_thinking(self, default: bool) -> bool:
        """Whether the model is to think first."""
        return default if self.thinking is None else self.thinking.type == "enabled"


def parse(kind: type[Body], data: Any) -> Any:
    """Check a parsed JSON body. Raises RequestError that names the field and what it may be."""
    if not isinstance(data, dict):
        raise RequestError(
            f"the body is a JSON {type(data).__name__}; expected an object with fields"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, kind) from None


_WORDS = {
    "extra_forbidden": "is not known here; remove it",
    "missing": "is missing; it is required",
    "none_required": "is not supported yet; leave it out",
}


def _explain(error: ValidationError, kind: type[Body]) -> RequestError:
    """One sentence about the first fault (of a union, about its deepest branch)."""
    faults = error.errors()
    first = str(faults[0]["loc"][0]) if faults[0]["loc"] else "body"
    same = [f for f in faults if f["loc"] and f["loc"][0] == faults[0]["loc"][0]]
    path = [str(p) for p in faults[0]["loc"] if p in kind.model_fields or isinstance(p, int)]
    name = ".".join(path) or first
    if faults[0]["type"] in _WORDS:
        named = ".".join(str(p) for p in faults[0]["loc"])
        return RequestError(f"{named} {_WORDS[faults[0]['type']]}", first)
    said = " or ".join(dict.fromkeys(f["msg"].removeprefix("Value error, ") for f in same))
    value = repr(faults[0]["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return RequestError(f"{name}: {said[0].lower()}{said[1:]} (got {shown})", first)


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An OpenAI error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(generation: Generation) -> dict[str, Any]:
    """The `usage` object."""
    used = generation.usage
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def envelope(kind: str, prefix: str, generation: Generation, model: str) -> dict[str, Any]:
    """The fields every response and chunk begins with."""
    return {
        "id": f"{prefix}-{generation.id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def choice(finish: str | None, **fields: Any) -> dict[str, Any]:
    """A choice with index 0."""
    return {"index": 0, **fields, "logprobs": None, "finish_reason": finish}
