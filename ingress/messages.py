"""Between protobuf messages and what the service takes and gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from whalepod.errors import RequestError
from whalepod.ingress.assembler import Delta
from whalepod.ingress.service import Generation, Options
from whalepod.model.chat import Message
from whalepod.protos import inference_pb2 as pb

Response = TypeVar("Response", pb.CompleteResponse, pb.ChatResponse)

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
# The service's names of what can be wrong, where they differ from the proto's.
_FIELDS = {"prompt": "input", "max_tokens": "sampling.max_tokens", "stop": "sampling.stop"} | {
    "stop_token_ids": "sampling.stop_token_ids"
}


def field_name(param: str) -> str:
    """The proto field that the service calls `param`."""
    return _FIELDS.get(param, param)


def options_of(request: pb.CompleteRequest | pb.ChatRequest) -> Options:
    """Settings with defaults filled in. Raises RequestError on what is out of range."""
    sampling = request.sampling

    def given(name: str, default: Any) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else default

    options = Options(
        max_tokens=given("max_tokens", None),
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=given("top_k", 0),
        seed=given("seed", None),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        cache_salt=request.cache_salt,
    )
    if not 0 <= options.temperature <= 2:
        raise _out_of("temperature", options.temperature, "0 to 2")
    if not 0 < options.top_p <= 1:
        raise _out_of("top_p", options.top_p, "above 0, at most 1")
    if options.max_tokens == 0:
        raise _out_of("max_tokens", 0, "at least 1")
    return options


def prompt_of(request: pb.CompleteRequest) -> str | Sequence[int]:
    """Text or token ids. Raises RequestError when neither is set."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestError("input is missing; set text or tokens", "prompt")
    return request.text if kind == "text" else request.tokens.ids


def message_of(message: pb.Message) -> Message:
    """One turn. Raises RequestError on an unknown role."""
    common = (message.content, message.reasoning_content, message.prefix)
    if message.role == pb.ROLE_SYSTEM:
        return Message("system", *common)
    if message.role == pb.ROLE_USER:
        return Message("user", *common)
    if message.role == pb.ROLE_ASSISTANT:
        return Message("assistant", *common)
    raise RequestError(
        f"role {message.role} is not supported; use ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT",
        "messages",
    )


def completion_of(delta: Delta, generation: Generation) -> pb.CompleteResponse:
    """A part of a completion."""
    return pb.CompleteResponse(text=delta.content, **_common(delta, generation))


def chat_of(delta: Delta, generation: Generation) -> pb.ChatResponse:
    """A part of an assistant turn."""
    return pb.ChatResponse(
        content=delta.content, reasoning_content=delta.reasoning, **_common(delta, generation)
    )


def _common(delta: Delta, generation: Generation) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": generation.id, "token_ids": delta.tokens}
    if delta.finish is not None:
        used = generation.usage
        fields["finish_reason"] = _FINISH[delta.finish]
        fields["usage"] = pb.Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
        )
    return fields


async def sum_up(parts: AsyncIterator[Response], total: Response) -> Response:
    """Add streamed parts up to one message."""
    names = [f.name for f in total.DESCRIPTOR.fields if f.name in _TEXTS]
    texts: dict[str, list[str]] = {name: [] for name in names}
    async for part in parts:
        for name, said in texts.items():
            said.append(getattr(part, name))
        total.token_ids.extend(part.token_ids)
        total.id, total.finish_reason = part.id, part.finish_reason
        if part.HasField("usage"):
            total.usage.CopyFrom(part.usage)
    for name, said in texts.items():
        setattr(total, name, "".join(said))
    return total


_TEXTS = ("text", "content", "reasoning_content")


def _out_of(name: str, value: float, expected: str) -> RequestError:
    return RequestError(f"{name} is {value:g}; expected {expected}", f"sampling.{name}")
