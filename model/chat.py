"""Render a conversation as V4's prompt, and split what the model says into reasoning and answer.

Markers are emitted as token ids, text through `encode_text`, so no message can forge a marker.
Source: DeepSeek-V4 `encoding/encoding_dsv4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from whalepod.errors import RequestError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"


class Encoder(Protocol):
    """What rendering needs of a tokenizer."""

    def encode_text(self, text: str) -> list[int]:
        """Encode without recognising control tokens."""
        ...

    def control_id(self, name: str) -> int:
        """Id of a control token. Raises KeyError."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `prefix` marks a last assistant message that the model is to continue."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str = ""
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a prompt: a marker, or text that is encoded as text whatever it looks like."""

    text: str
    control: bool = False


def pieces(messages: Sequence[Message], thinking: bool) -> list[Piece]:
    """Lay a conversation out.

    Consecutive user messages are one turn, joined by an empty line. Reasoning of turns before the
    last user turn is dropped. The prompt ends where the assistant is to speak.

    Raises:
        RequestError: nothing to answer.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one user message", "messages")
    _check_end(messages)
    return [Piece(BOS, True), *_turns(messages, thinking)]


def render(messages: Sequence[Message], thinking: bool, encoder: Encoder) -> list[int]:
    """Token ids of the prompt."""
    ids: list[int] = []
    for piece in pieces(messages, thinking):
        if piece.control:
            ids.append(_control(encoder, piece.text))
        elif piece.text:
            ids += encoder.encode_text(piece.text)
    return ids


def render_text(messages: Sequence[Message], thinking: bool) -> str:
    """The prompt as one string (for people and tests; never encode it)."""
    return "".join(piece.text for piece in pieces(messages, thinking))


def _check_end(messages: Sequence[Message]) -> None:
    last = messages[-1]
    if last.prefix and last.role != "assistant":
        raise RequestError(
            f"prefix: true is on a message of role {last.role}; it belongs on the assistant's",
            "messages",
        )
    if last.role == "assistant" and not last.prefix:
        raise RequestError(
            "the last message is the assistant's; end with a user message, or set "
            "prefix: true on it to have it continued",
            "messages",
        )
    asked = messages[-2:-1] if last.prefix else messages[-1:]
    if not asked or asked[0].role != "user":
        raise RequestError(
            f"there is no user message {'before the prefix' if last.prefix else 'at the end'}; "
            "add one for the model to answer",
            "messages",
        )


def _turns(messages: Sequence[Message], thinking: bool) -> Iterator[Piece]:
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    last_user = users[-1] if users else -1
    for i, message in enumerate(messages):
        before = messages[i - 1] if i else None
        after = messages[i + 1] if i + 1 < len(messages) else None
        if message.role == "system":
            yield Piece(message.content)
        elif message.role == "user":
            if before is not None and before.role == "user":
                yield Piece("\n\n")
            else:
                yield Piece(USER, True)
            yield Piece(message.content)
            if after is None or after.role == "assistant":
                yield Piece(ASSISTANT, True)
                thinks = thinking and i == last_user
                yield Piece(THINK if thinks else END_THINK, True)
        else:
            if thinking and i > last_user:
                yield Piece(message.reasoning)
                yield Piece(END_THINK, True)
            yield Piece(message.content)
            if not message.prefix or after is not None:
                yield Piece(EOS, True)


def _control(encoder: Encoder, name: str) -> int:
    try:
        return encoder.control_id(name)
    except KeyError:
        raise RequestError(
            f"this checkpoint's tokenizer has no {name}, so it cannot chat; use /v1/completions",
            "messages",
        ) from None


class ReasoningSplitter:
    """Says of each generated token whether it is reasoning, the mark between, or the answer."""

    def __init__(self, encoder: Encoder, thinking: bool) -> None:
        self._think = {_control(encoder, THINK)}
        self.end = _control(encoder, END_THINK)
        self.reasoning = thinking

    def push(self, token: int) -> Literal["reasoning", "content", "mark"]:
        """Classify the next token."""
        if token == self.end:
            self.reasoning = False
            return "mark"
        if token in self._think:
            return "mark"
        return "reasoning" if self.reasoning else "content"
