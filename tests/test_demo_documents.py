"""Generated documents: form, truth, what is held out."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
from demo.batches import SYSTEM_WEIGHT, USER_WEIGHT, Recipe, Source
from demo.documents import document, lesson
from demo.documents.protocol import Dialogue, Turn
from demo.documents.recall import facts
from demo.documents.talk import talk
from demo.documents.tools import tool_talk
from demo.documents.words import HELD_OUT_CITIES
from demo.evaluation.text import parse_call

from whalepod.model.chat import Message, render_text
from whalepod.model.tiny_tokenizer import small_tokenizer

END = "<｜end▁of▁sentence｜>"


def test_a_document_is_a_function_of_its_seed() -> None:
    assert [document(Random(s)) for s in range(20)] == [document(Random(s)) for s in range(20)]
    assert len({document(Random(s)) for s in range(200)}) > 190


def test_prompts_are_what_the_server_renders() -> None:
    checked = 0
    for seed in range(300):
        dialogue = talk(Random(seed))
        thinking = dialogue.turns[-1].thought is not None
        messages = [Message("system", dialogue.system)] if dialogue.system else []
        for turn in dialogue.turns:
            messages += [Message("user", turn.asked), Message("assistant", turn.answer)]
        assert render_text(messages[:-1], thinking) == dialogue.prompt()
        checked += thinking
    assert 50 < checked < 250


def test_sums_are_right() -> None:
    seen = 0
    for seed in range(600):
        for turn in talk(Random(seed)).turns:
            found = re.search(r"(\d+) (plus|minus) (\d+) is (\d+)\.$", turn.answer)
            if found:
                a, b, c = (int(found[i]) for i in (1, 3, 4))
                assert c == (a + b if found[2] == "plus" else a - b)
                seen += 1
    assert seen > 100


def test_every_call_parses_and_carries_what_was_asked() -> None:
    for seed in range(100):
        dialogue = tool_talk(Random(seed), held_out=True)
        call = parse_call(dialogue.turns[-1].answer)
        assert call is not None
        name, arguments = call
        assert f'"name": "{name}"' in dialogue.system
        for value in arguments.values():
            if not isinstance(value, bool):
                assert str(value) in dialogue.turns[-1].asked


@pytest.mark.parametrize(
    "broken",
    [
        "no call",
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜tool_calls>',
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" '
        'string="false">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    ],
)
def test_what_is_out_of_form_does_not_parse(broken: str) -> None:
    assert parse_call(broken) is None


def test_held_out_cities_stay_out_of_training_calls() -> None:
    calls = "".join(
        turn.answer
        for s in range(400)
        for turn in tool_talk(Random(s)).turns
        if "invoke" in turn.answer
    )
    assert not any(city in calls for city in HELD_OUT_CITIES)
    asked = "".join(tool_talk(Random(s), held_out=True).turns[0].asked for s in range(100))
    assert any(city in asked for city in HELD_OUT_CITIES)


def test_a_lessons_answers_stand_in_its_text() -> None:
    for seed in range(30):
        text = lesson(Random(seed), 3000)
        told, *answers = re.split(r"<｜Assistant｜></think>", text)
        assert len(answers) >= 3
        for answer in answers:
            assert answer.split(END)[0] in told


def test_facts_do_not_contradict_each_other() -> None:
    known = facts(Random(1), 60)
    assert len({fact.asked for fact in known}) == 60
    assert all(fact.value in fact.answer for fact in known)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "tokenizer.json").write_text(small_tokenizer(1024), encoding="utf-8")
    text = "The whale swam past the harbour. Nobody saw it go. " * 200
    (tmp_path / "texts.train").write_text("\0".join([text] * 3), encoding="utf-8")
    import numpy as np

    np.arange(9000, dtype=np.uint16).tofile(tmp_path / "texts.train.bin")
    return Source(tmp_path)


def test_batches_are_reproducible_full_and_mixed(source: Source) -> None:
    recipe = Recipe(8, 600)
    ids, weights = source.batch(recipe, 5)
    again, _ = source.batch(recipe, 5)
    assert ids.shape == (8, 601)
    assert weights.shape == (8, 600)
    assert ids.equal(again)
    assert not ids.equal(source.batch(recipe, 6)[0])
    free = (weights == 1).float().mean(1)
    assert free[:2].tolist() == [1.0, 1.0]  # literature: every token counts
    assert (free[5:] < 0.7).all()  # lessons: mostly a user's text


def test_answers_weigh_one_and_questions_little(source: Source) -> None:
    ids = source.ids(Dialogue([Turn("Hello you", "Hi", None)], "Be kind").text())
    weight = source.weights(ids)
    first, answer = (int((ids == i).nonzero()[0][0]) for i in (source.user, source.assistant))
    assert (weight[1:first] == weight.dtype.type(SYSTEM_WEIGHT)).all()
    assert (weight[first : answer + 2] == weight.dtype.type(USER_WEIGHT)).all()
    assert (weight[answer + 2 :] == 1).all()
    assert len(weight) > answer + 2
