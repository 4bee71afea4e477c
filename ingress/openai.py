"""The OpenAI dialect: request bodies checked to the letter, response objects built by hand."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from whalepod.errors import RequestError
from whalepod.ingress.options import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    MAX_STOPS,
    PRIORITIES,
    Options,
)
from whalepod.ingress.outputs import Outputs, check_best_of, check_max_tokens, prompt_count
from whalepod.ingress.structured import (
    NamedSchema,
    ResponseFormat,
    StructuredOutputs,
    wanted,
)
from whalepod.model.chat import Message

# Not offered yet, and the values (beside empty ones) that ask for nothing: clients send defaults.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "suffix": (),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "reasoning_effort": (),
}


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
_StopTexts = Annotated[list[_StopText], Field(max_length=MAX_STOPS, fail_fast=True)]
_StopIds = Annotated[list[int], Field(max_length=MAX_STOP_IDS, fail_fast=True)]
_TokenIds = Annotated[list[int], Field(min_length=1, max_length=MAX_BIASES, fail_fast=True)]
_TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
# A body may hold a million wrong entries; the first one is enough to say.
_Ids = Annotated[list[int], Field(fail_fast=True)]


class Common(Outputs, Body):
    """Fields that completions and chat share."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = None
    stop: _StopText | _StopTexts | None = None
    stop_token_ids: _StopIds | None = None
    ignore_eos: bool = False
    cache_salt: str | None = Field(default=None, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[_TokenKey, _Bias] | None = Field(default=None, max_length=MAX_BIASES)
    min_p: float | None = Field(default=None, ge=0, le=1)
    min_tokens: int | None = Field(default=None, ge=0)
    allowed_token_ids: _TokenIds | None = None
    banned_token_ids: _TokenIds | None = None
    priority: int | None = Field(default=None, ge=PRIORITIES[0], le=PRIORITIES[1])
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator(*_NOT_YET, check_fields=False)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        fine = _NOT_YET[str(info.field_name)]
        if value and value not in fine:
            what = f" or send {fine[0]!r}" if fine else ""
            raise ValueError(f"is not supported yet; leave it out{what}")
        return value

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, max_tokens: int | None) -> Options:
        """The settings with defaults filled in. Raises RequestError."""
        check_max_tokens(max_tokens, self.echoes or self.prompt_logprobs is not None)
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
            cache_salt=self.cache_salt or "",
            min_p=self.min_p or 0.0,
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=tuple((int(k), v) for k, v in (self.logit_bias or {}).items()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            banned_token_ids=tuple(self.banned_token_ids or ()),
            priority=self.priority or 0,
            timeout_s=self.timeout,
            grammar=wanted(self.response_format, self.structured_outputs),
            logprobs=self.logprobs_wanted,
            prompt_logprobs=prompt_count(self.prompt_logprobs, self.echoes, self.logprobs_wanted),
            n=self.n or 1,
        )

    @property
    def logprobs_wanted(self) -> int | None:
        """Alternatives to tell with each token; None: no log-probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the text."""
        return False


class CompletionBody(Common):
    """`POST /v1/completions`."""

    prompt: str | _Ids
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def logprobs_wanted(self) -> int | None:
        """See `Common`."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """See `Common`."""
        return bool(self.echo)

    def options(self, max_tokens: int | None) -> Options:
        """See `Common`."""
        check_best_of(self.best_of, self.n)
        return super().options(max_tokens)

    @field_validator("prompt", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        """Take a list of one prompt as that prompt."""
        if isinstance(value, list) and value and isinstance(value[0], (str, list)):
            if len(value) > 1:
                raise ValueError("only one prompt is supported yet; send several requests")
            return value[0]
        return value


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
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

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=0)
    thinking: Thinking | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_of_what(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    @property
    def logprobs_wanted(self) -> int | None:
        """See `Common`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def is_thinking(self, default: bool) -> bool:
        """Whether the model is to think first."""
        return default if self.thinking is None else self.thinking.type == "enabled"


def parse(kind: type[Body], data: Any) -> Any:
    """Check a parsed JSON body. Raises RequestError that names the field and what it may be."""
    if not isinstance(data, dict):
        raise RequestError(
            f"the body is a JSON {type(data).__name__}; expected an object with fields"
        )
    unknown = next((key for key in data if key not in kind.model_fields), None)
    if unknown is not None:
        raise RequestError(f"{unknown[:80]} is not known here; remove it", unknown[:80])
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None


_WORDS = {
    "extra_forbidden": "is not known here; remove it",
    "missing": "is missing; it is required",
}


def _explain(error: ValidationError) -> RequestError:
    """One sentence about the first fault (of a union, about all its branches)."""
    faults = error.errors(include_url=False, include_context=False)
    fault = faults[0]
    first = str(fault["loc"][0])
    if fault["type"] in _WORDS:
        named = ".".join(str(p) for p in fault["loc"])[:120]
        return RequestError(f"{named} {_WORDS[fault['type']]}", first)
    # A location also names the branches of unions, which mean nothing to a client.
    path = [p for p in fault["loc"] if isinstance(p, int) or p in _FIELDS]
    same = dict.fromkeys(f["msg"] for f in faults[:4] if f["loc"][0] == fault["loc"][0])
    said = " or ".join(msg.removeprefix("Value error, ") for msg in same)
    value = repr(fault["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    name = ".".join(map(str, path))
    return RequestError(f"{name}: {said[0].lower()}{said[1:]} (got {shown})", first)


_FIELDS = {
    name
    for kind in (
        *(CompletionBody, ChatBody, ChatMessage, TextPart, Thinking, StreamOptions),
        *(ResponseFormat, NamedSchema, StructuredOutputs),
    )
    for field, info in kind.model_fields.items()
    for name in (field, info.alias)
    if name
}
