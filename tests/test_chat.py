"""Prompts against the strings of the model's own encoder."""

import pytest

from whalepod.errors import RequestError
from whalepod.model.chat import Message, ReasoningSplitter, pieces, render, render_text
from whalepod.model.tiny_tokenizer import small_tokenizer
from whalepod.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer(small_tokenizer(1024))
S, A, B, C = "S", "A", "B", "C"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str, reasoning: str = "", prefix: bool = False) -> Message:
    return Message("assistant", text, reasoning, prefix)


@pytest.mark.parametrize(
    ("messages", "thinking", "expected"),
    [
        (
            [Message("system", S), user(A), said(B), user(C)],
            False,
            f"{BOS}S<｜User｜>A<｜Assistant｜></think>B{EOS}<｜User｜>C<｜Assistant｜></think>",
        ),
        (
            [user(A), said(B, "R1"), user(C)],
            True,
            f"{BOS}<｜User｜>A<｜Assistant｜></think>B{EOS}<｜User｜>C<｜Assistant｜><think>",
        ),
        (
            [user(A), said(B, "R", prefix=True)],
            True,
            f"{BOS}<｜User｜>A<｜Assistant｜><think>R</think>B",
        ),
        (
            [user(A), said(B, prefix=True)],
            False,
            f"{BOS}<｜User｜>A<｜Assistant｜></think>B",
        ),
        ([user(A), user(B)], False, f"{BOS}<｜User｜>A\n\nB<｜Assistant｜></think>"),
        ([user(A)], True, f"{BOS}<｜User｜>A<｜Assistant｜><think>"),
    ],
)
def test_strings_of_the_release(messages: list[Message], thinking: bool, expected: str) -> None:
    assert render_text(messages, thinking) == expected
    assert TOKENIZER.decode(render(messages, thinking, TOKENIZER)) == expected


@pytest.mark.parametrize("name", ["<｜Assistant｜>", "</think>", EOS, "<think>", "｜DSML｜"])
def test_users_cannot_inject_control_tokens(name: str) -> None:
    ids = render([user(f"x{name}y")], False, TOKENIZER)
    plain = render([user("xy")], False, TOKENIZER)
    control = TOKENIZER.control_id(name)
    assert ids.count(control) == plain.count(control)
    assert TOKENIZER.decode(ids).count(name) == TOKENIZER.decode(plain).count(name) + 1


def test_nothing_to_answer_is_an_error() -> None:
    with pytest.raises(RequestError, match="at least one user message"):
        pieces([], False)
    with pytest.raises(RequestError, match="prefix: true"):
        pieces([user(A), said(B)], False)


def test_splitter_follows_the_marks() -> None:
    think, end = TOKENIZER.control_id("<think>"), TOKENIZER.control_id("</think>")
    splitter = ReasoningSplitter(TOKENIZER, thinking=True)
    kinds = [splitter.push(t) for t in (think, 5, end, 6, end, 7)]
    assert kinds == ["mark", "reasoning", "mark", "content", "mark", "content"]
    assert ReasoningSplitter(TOKENIZER, thinking=False).push(5) == "content"
