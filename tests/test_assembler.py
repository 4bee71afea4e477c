"""Text deltas against the whole text, decoded and cut at once."""

import pytest
from edge import TOKENIZER
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whalepod.engine.request import TokenEvent
from whalepod.ingress.assembler import Assembler, Chosen, Delta, Finish
from whalepod.model.chat import ReasoningSplitter

THINK, END = TOKENIZER.control_id("<think>"), TOKENIZER.control_id("</think>")


def event(token: int) -> TokenEvent:
    return TokenEvent("r", 0, token, -0.25)


def told(text: str, tokens: tuple[int, ...], finish: Finish | None = None) -> Delta:
    return Delta(text, "", tokens, finish, tuple(Chosen(token, -0.25) for token in tokens))


def assemble(
    ids: list[int], stop: tuple[str, ...] = (), thinking: bool | None = None
) -> list[Delta]:
    """All deltas of a stream that the engine ends with `length`."""
    splitter = None if thinking is None else ReasoningSplitter(TOKENIZER, thinking)
    assembler = Assembler(TOKENIZER.detokenizer(), stop, splitter)
    deltas = []
    for i, token in enumerate(ids):
        deltas.append(assembler.push(event(token), "length" if i + 1 == len(ids) else None, False))
        if deltas[-1].finish is not None:
            break
    return deltas


def cut(text: str, stop: tuple[str, ...]) -> str:
    """What comes before the stop string that is complete first, letter by letter: the oracle."""
    for end in range(1, len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(map(len, met))]
    return text


# Few letters, so that stop strings, their beginnings and overlaps are met often.
PLAIN = st.text("ab鲸é🐋 ", min_size=1, max_size=24)
STOPS = st.lists(st.text("ab鲸é ", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(deadline=None)
@given(PLAIN, STOPS)
@example("aab", ("ab",))
@example("abaab", ("abab", "aab"))
@example(" aa", ("a", " aa"))
def test_text_is_the_whole_text_up_to_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    ids = TOKENIZER.encode_text(text)
    deltas = assemble(ids, stop)
    expected = cut(text, stop)
    assert "".join(d.content for d in deltas) == expected
    assert deltas[-1].finish == ("length" if expected == text else "stop")
    given_out = [t for d in deltas for t in d.tokens]
    assert given_out == ids[: len(given_out)]
    if expected == text:
        assert given_out == ids


@settings(deadline=None)
@given(PLAIN, PLAIN, STOPS)
@example("aa", "b", ("ab",))
@example("ab", "b", ("abb",))
def test_reasoning_and_content_do_not_run_into_each_other(
    thought: str, answer: str, stop: tuple[str, ...]
) -> None:
    ids = [*TOKENIZER.encode_text(thought), END, *TOKENIZER.encode_text(answer)]
    deltas = assemble(ids, stop, thinking=True)
    reasoning = cut(thought, stop)
    assert "".join(d.reasoning for d in deltas) == reasoning
    assert "".join(d.content for d in deltas) == (cut(answer, stop) if reasoning == thought else "")


@settings(deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=12))
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    control = set(range(3)) | {THINK, END}
    ids = [i for i in ids if i not in control] or [5]
    deltas = assemble(ids)
    assert "".join(d.content for d in deltas) == TOKENIZER.decode(ids)
    assert [t for d in deltas for t in d.tokens] == ids


@pytest.mark.parametrize("thinking", [False, True])
def test_marks_are_no_text(thinking: bool) -> None:
    ids = [THINK, *TOKENIZER.encode_text("a"), END, END, *TOKENIZER.encode_text("b")]
    deltas = assemble(ids, thinking=thinking)
    assert "".join(d.reasoning for d in deltas) == ("a" if thinking else "")
    assert "".join(d.content for d in deltas) == ("b" if thinking else "ab")
    assert [t for d in deltas for t in d.tokens] == ids


def test_an_incomplete_character_comes_out_at_the_end() -> None:
    ids = TOKENIZER.encode_text("a🐋")[:-1]
    deltas = assemble(ids)
    assert "".join(d.content for d in deltas) == "a\ufffd"
    assert all("\ufffd" not in d.content for d in deltas[:-1])


def test_a_stop_id_is_no_text_and_text_held_back_comes_with_it() -> None:
    assembler = Assembler(TOKENIZER.detokenizer(), ("abc",), None)
    (a, b) = (TOKENIZER.encode_text(c)[0] for c in "ab")
    assert assembler.push(event(a), None, False).is_empty
    assert assembler.push(event(b), None, False).is_empty
    assert assembler.push(event(1), "stop", True) == told("ab", (a, b, 1), "stop")


def test_without_a_decoder_every_token_is_a_delta() -> None:
    assembler = Assembler(None, (), None)
    assert assembler.push(event(7), None, False) == told("", (7,))
    assert assembler.push(event(8), "length", False) == told("", (8,), "length")
