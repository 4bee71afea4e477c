"""Between protobuf messages and what the service takes and gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.request import Grammar
from whalepod.errors import RequestError
from whalepod.ingress.assembler import Chosen, Delta
from whalepod.ingress.generation import Generation
from whalepod.ingress.options import MAX_BIASES, MAX_CHOICES, MAX_LOGPROBS, Options
from whalepod.ingress.outputs import check_max_tokens
from whalepod.ingress.structured import any_object, choice_of, schema_of, text_of
from whalepod.model.chat import Message
from whalepod.protos import inference_pb2 as pb

Response = TypeVar("Response", pb.CompleteResponse, pb.ChatResponse)

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
# The service's names of what can be wrong, where they differ from the proto's.
_FIELDS = {"prompt": "input", "max_tokens": "sampling.max_tokens", "stop": "sampling.stop"} | {
    "stop_token_ids": "sampling.stop_token_ids",
    "structured_outputs": "sampling.structured_output",
    "n": "sampling.n",
}


def field_name(param: str) -> str:
    """The proto field that the service calls `param`."""
    return _FIELDS.get(param, param)


def options_of(
    request: pb.CompleteRequest | pb.ChatRequest, timeout_s: float | None = None
) -> Options:
    """Settings with defaults filled in. Raises RequestError on what is out of range.

    Args:
        timeout_s: what is left of the RPC's deadline, if it has one.
    """
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
        min_p=sampling.min_p,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=given("repetition_penalty", 1.0),
        logit_bias=tuple(sampling.logit_bias.items()),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        banned_token_ids=tuple(sampling.banned_token_ids),
        priority=request.priority,
        timeout_s=timeout_s,
        grammar=_grammar_of(sampling),
        logprobs=given("logprobs", None),
        prompt_logprobs=given("prompt_logprobs", None),
        n=given("n", 1),
    )
    _check_ranges(options)
    if not 0 <= options.temperature <= 2:
        raise _out_of("temperature", options.temperature, "0 to 2")
    if not 0 < options.top_p <= 1:
        raise _out_of("top_p", options.top_p, "above 0, at most 1")
    check_max_tokens(options.max_tokens, options.prompt_logprobs is not None)
    return options


def _grammar_of(sampling: pb.Sampling) -> Grammar | None:
    if not sampling.HasField("structured_output"):
        return None
    output, param = sampling.structured_output, "sampling.structured_output"
    kind = output.WhichOneof("kind")
    if kind == "json_schema":
        return schema_of(output.json_schema, param)
    if kind == "choice":
        return choice_of(output.choice.texts, param)
    if kind == "regex" and output.regex:
        return text_of("regex", output.regex, param)
    if kind == "grammar" and output.grammar:
        return text_of("grammar", output.grammar, param)
    if kind == "json_object" and output.json_object:
        return any_object()
    raise RequestError(
        "structured_output is empty; set json_schema, json_object, regex, choice or grammar", param
    )


def _check_ranges(options: Options) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(options, name) <= 2:
            raise _out_of(name, getattr(options, name), "-2 to 2")
    if not 0 < options.repetition_penalty <= 10:
        raise _out_of("repetition_penalty", options.repetition_penalty, "above 0, at most 10")
    if not 0 <= options.min_p <= 1:
        raise _out_of("min_p", options.min_p, "0 to 1")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(options, name) or 0) > MAX_LOGPROBS:
            raise _out_of(name, getattr(options, name), f"at most {MAX_LOGPROBS}")
    if not 1 <= options.n <= MAX_CHOICES:
        raise _out_of("n", options.n, f"1 to {MAX_CHOICES}")
    wrong = next((v for _, v in options.logit_bias if not -100 <= v <= 100), None)
    if wrong is not None:
        raise _out_of("logit_bias", wrong, "-100 to 100")
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids"):
        if len(getattr(options, name)) > MAX_BIASES:
            raise _out_of(name, len(getattr(options, name)), f"at most {MAX_BIASES} entries")


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


def completion_of(delta: Delta, place: Place) -> pb.CompleteResponse:
    """A part of a completion."""
    return pb.CompleteResponse(text=delta.content, **_common(delta, place))


def chat_of(delta: Delta, place: Place) -> pb.ChatResponse:
    """A part of an assistant turn."""
    return pb.ChatResponse(
        content=delta.content, reasoning_content=delta.reasoning, **_common(delta, place)
    )


@dataclass(slots=True)
class Place:
    """Where in a generation the next message stands.

    Args:
        unfinished: answers without a finish_reason so far.
    """

    generation: Generation
    unfinished: int
    begun: bool = False


def _common(delta: Delta, place: Place) -> dict[str, Any]:
    generation = place.generation
    fields: dict[str, Any] = {
        "id": generation.id,
        "token_ids": delta.tokens,
        "index": delta.index,
    }
    if not place.begun and generation.prompt is not None:
        fields["prompt_logprobs"] = _told_of_prompt(generation.prompt_ids, generation.prompt)
    place.begun = True
    if generation.logprobs is not None:
        fields["logprobs"] = [_told(one) for one in delta.chosen]
    if delta.finish is not None:
        place.unfinished -= 1
        fields["finish_reason"] = _FINISH[delta.finish]
    if not place.unfinished:
        used = generation.usage
        fields["usage"] = pb.Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
            accepted_prediction_tokens=used.accepted_tokens,
            rejected_prediction_tokens=used.drafted_tokens - used.accepted_tokens,
        )
    return fields


def _told(one: Chosen) -> pb.TokenLogprob:
    top = [pb.TokenLogprob(token_id=i, logprob=p) for i, p in one.alternatives]
    return pb.TokenLogprob(token_id=one.token, logprob=one.logprob, top=top)


def _told_of_prompt(ids: Sequence[int], told: PromptLogprobs) -> list[pb.TokenLogprob]:
    ranks, tops = (
        told.ranks_R.tolist(),
        zip(told.ids_RK.tolist(), told.values_RK.tolist(), strict=True),
    )
    rows = zip(ids[1:], told.logprobs_R.tolist(), ranks, tops, strict=True)
    return [pb.TokenLogprob(token_id=ids[0])] + [
        pb.TokenLogprob(
            token_id=token,
            logprob=logprob,
            rank=rank,
            top=[pb.TokenLogprob(token_id=i, logprob=p) for i, p in zip(*top, strict=True)],
        )
        for token, logprob, rank, top in rows
    ]


async def sum_up(parts: AsyncIterator[Response], kind: type[Response]) -> Response:
    """Add streamed parts up to one message: the first answer, and in it the others."""
    by_index: dict[int, list[Response]] = {}
    async for part in parts:
        by_index.setdefault(part.index, []).append(part)
    first, *others = (_added(by_index[index], kind()) for index in sorted(by_index))
    for other in others:
        if other.HasField("usage"):
            first.usage.CopyFrom(other.usage)
            other.ClearField("usage")
    first.others.extend(others)
    return first


def _added(parts: Sequence[Response], total: Response) -> Response:
    """All parts of one answer as one."""
    for part in parts:
        total.token_ids.extend(part.token_ids)
        total.logprobs.extend(part.logprobs)
        total.prompt_logprobs.extend(part.prompt_logprobs)
        if part.HasField("usage"):
            total.usage.CopyFrom(part.usage)
    last = parts[-1]
    total.id, total.finish_reason, total.index = last.id, last.finish_reason, last.index
    for name in (f.name for f in total.DESCRIPTOR.fields if f.name in _TEXTS):
        setattr(total, name, "".join(getattr(part, name) for part in parts))
    return total


_TEXTS = ("text", "content", "reasoning_content")


def _out_of(name: str, value: float, expected: str) -> RequestError:
    return RequestError(f"{name} is {value:g}; expected {expected}", f"sampling.{name}")
