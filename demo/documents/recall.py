"""Documents with facts early and questions late, to teach looking far back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.documents.protocol import Dialogue, Turn
from demo.documents.stories import story
from demo.documents.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    FOODS,
    JOBS,
    NAMES,
    PLACES,
    THINGS,
    invented,
)

Filler = Callable[[int], str]


@dataclass(frozen=True)
class Fact:
    """A statement, the question for it and its answer; `value` is what must be remembered."""

    said: str
    asked: str
    answer: str
    value: str


def _name(rng: Random) -> str:
    return invented(rng) if rng.random() < 0.2 else rng.choice(NAMES)


def _number(rng: Random) -> Fact:
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    value = "".join(rng.choice("0123456789") for _ in range(4))
    said = f"The number of the {thing} is {value}."
    return Fact(said, f"What is the number of the {thing}?", said, value)


def _home(rng: Random) -> Fact:
    name, city = _name(rng), invented(rng) if rng.random() < 0.3 else rng.choice(CITIES)
    return Fact(f"{name} lives in {city}.", f"Where does {name} live?", f"{name} lives in {city}.", city)  # fmt: skip


def _likes(rng: Random) -> Fact:
    name, animal = _name(rng), rng.choice(ANIMALS)
    said = f"The animal that {name} likes best is the {animal}."
    return Fact(said, f"Which animal does {name} like best?", said, animal)


def _eats(rng: Random) -> Fact:
    name, food = _name(rng), rng.choice(FOODS)
    return Fact(f"{name} always eats {food}.", f"What does {name} always eat?", f"{name} always eats {food}.", food)  # fmt: skip


def _work(rng: Random) -> Fact:
    name, job = _name(rng), rng.choice(JOBS)
    return Fact(f"{name} works as a {job}.", f"What does {name} work as?", f"{name} works as a {job}.", job)  # fmt: skip


def _password(rng: Random) -> Fact:
    place = rng.choice(PLACES)
    word = invented(rng).lower() if rng.random() < 0.3 else rng.choice(THINGS + ANIMALS)
    said = f"The password of the {place} is {word}."
    return Fact(said, f"What is the password of the {place}?", said, word)


def _hidden(rng: Random) -> Fact:
    thing, place = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}", rng.choice(PLACES)
    said = f"The {thing} is hidden in the {place}."
    return Fact(said, f"Where is the {thing} hidden?", said, place)


MAKERS = (_number, _number, _home, _likes, _eats, _work, _password, _hidden)


def facts(rng: Random, count: int) -> list[Fact]:
    """Different facts that do not contradict each other."""
    found: dict[str, Fact] = {}
    while len(found) < count:
        fact = rng.choice(MAKERS)(rng)
        found.setdefault(fact.asked, fact)
    return list(found.values())


def stories(rng: Random) -> Filler:
    """Filler of about so many characters, made of stories."""

    def fill(chars: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < chars:
            parts.append(story(rng).text)
        return " ".join(parts)

    return fill


def table(rng: Random, chars: int) -> Dialogue:
    """Facts in one block and a question for each: the densest lesson."""
    count = max(3, chars // 130)
    known = facts(rng, count)
    asked = rng.sample(known, count)
    opening = " ".join(f.said for f in known)
    turns = [Turn(f"{opening} {asked[0].asked}", asked[0].answer)]
    return Dialogue(turns + [Turn(f.asked, f.answer) for f in asked[1:]])


def scattered(rng: Random, chars: int, fill: Filler, questions: int) -> Dialogue:
    """Facts strewn over a long text, questions at its end, any of the facts asked for."""
    count = max(questions, rng.randint(chars // 300 + 2, chars // 110 + 3))
    known, parts = facts(rng, count), []
    room = max(0, chars - 60 * count - 90 * questions)
    cuts = sorted(rng.random() for _ in range(count))
    for fact, gap in zip(
        known, [b - a for a, b in zip([0.0, *cuts], cuts, strict=False)], strict=True
    ):
        parts.append(fact.said)
        if gap * room > 60:
            parts.append(fill(int(gap * room) - 60))
    asked = rng.sample(known, questions)
    turns = [Turn(f"{' '.join(parts)} {asked[0].asked}", asked[0].answer)]
    return Dialogue(turns + [Turn(f.asked, f.answer) for f in asked[1:]])


def recall(rng: Random, chars: int, fill: Filler) -> Dialogue:
    """A lesson of about so many characters."""
    if rng.random() < 0.35:
        return table(rng, min(chars, rng.choice((500, 1200, 2500, 5000))))
    return scattered(rng, chars, fill, rng.randint(3, max(4, chars // 500)))
