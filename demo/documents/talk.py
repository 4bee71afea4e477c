"""Conversations: greetings, small questions, stories on request, sums; with and without thinking."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo.documents.protocol import Dialogue, Turn
from demo.documents.stories import story
from demo.documents.words import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    DAYS,
    FACTS,
    FOODS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PLACES,
    SOUNDS,
    THINGS,
    article,
)

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers in short sentences.",
    "You tell stories to children.",
    "Answer the question.",
)
_MAX_EFFORT = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the \
root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""


def _greeting(rng: Random) -> Turn:
    name = rng.choice(NAMES)
    pairs = [
        (("Hello!", "Hi!", "Hello", "Hey!", "Hi there."), "Hello! How can I help you today?"),
        (("Good morning.", "Good morning!"), "Good morning! What can I do for you?"),
        (("Who are you?", "What are you?"), "I am a small model. I can tell stories and answer questions."),
        (("How are you?", "How are you today?"), "I am well, thank you. How can I help you?"),
        (("Thank you!", "Thanks.", "Thank you very much."), "You are welcome!"),
        (("Good night.", "Goodbye!", "Bye."), "Goodbye! It was nice to talk to you."),
        (("What can you do?", "Can you help me?"), "I can tell a story, add numbers, and answer simple questions."),
        ((f"Hello, my name is {name}.", f"Hi, I am {name}."), f"Hello {name}! How can I help you today?"),
    ]  # fmt: skip
    asked, answer = rng.choice(pairs)
    return Turn(rng.choice(asked), answer)


def _story(rng: Random) -> Turn:
    told = story(rng)
    asked = rng.choice(
        [
            f"Tell me a story about {told.hero} and {article(told.animal)}.",
            f"Tell me a story about {article(told.animal)}.",
            f"Please tell me a story about {told.hero}.",
            "Tell me a story.",
            f"Write a short story about {told.hero} and {article(told.animal)}.",
        ]
    )
    return Turn(asked, told.text)


def _about_story(rng: Random) -> Turn:
    told = story(rng)
    ask = rng.randrange(3)
    if ask == 0:
        return Turn(
            f"{told.text} Who is the story about?", f"The story is about {told.hero}.",
            f"The story begins with {told.hero}.",
        )  # fmt: skip
    if ask == 1 and told.animal in told.text:
        animal = article(told.animal)
        return Turn(
            f"{told.text} Which animal is in the story?", f"There is {animal} in the story.",
            f"The story says: {animal}.",
        )  # fmt: skip
    friend = told.friend in told.text
    answer = (
        f"Yes, {told.friend} is in the story." if friend else f"No, {told.friend} is not in it."
    )
    thought = f"I look for {told.friend}. {'Found.' if friend else 'There is none.'}"
    return Turn(f"{told.text} Is {told.friend} in the story?", answer, thought)


def _sum(rng: Random) -> Turn:
    if rng.random() < 0.6:
        top = rng.choice((10, 20, 50, 100))
        a, b = rng.randint(0, top), rng.randint(0, top)
        ways = (f"What is {a} plus {b}?", f"What is {a} + {b}?", f"Add {a} and {b}.")
        return Turn(rng.choice(ways), f"{a} plus {b} is {a + b}.", _column(a, b))
    a = rng.randint(0, 50)
    b = rng.randint(0, a)
    ways = (f"What is {a} minus {b}?", f"What is {a} - {b}?")
    return Turn(rng.choice(ways), f"{a} minus {b} is {a - b}.", f"{a} - {b} = {a - b}.")


def _column(a: int, b: int) -> str:
    """The addition digit by digit, as a person would think it."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    said = f"{a % 10} + {b % 10} = {ones}. {a // 10} + {b // 10}"
    said += f" + {carry} = {tens + carry}." if carry else f" = {tens}."
    return f"{said} So {a} + {b} = {a + b}."


def _word_problem(rng: Random) -> Turn:
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(FOODS + THINGS)
    a, b = rng.randint(2, 20), rng.randint(1, 12)
    if rng.random() < 0.5 or b > a:
        asked = f"{name} has {a} coins. {friend} gives {name} {b} coins. How many coins does {name} have now?"
        return Turn(asked, f"{name} has {a + b} coins now.", f"{name} had {a} and got {b}. {a} + {b} = {a + b}.")  # fmt: skip
    asked = (
        f"{name} has {a} coins and pays {b} coins for {article(thing)}. How many coins are left?"
    )
    return Turn(asked, f"{a - b} coins are left.", f"{name} had {a} and paid {b}. {a} - {b} = {a - b}.")  # fmt: skip


def _compare(rng: Random) -> Turn:
    if rng.random() < 0.5:
        a, b = rng.sample(range(1, 100), 2)
        answer = f"{max(a, b)} is larger than {min(a, b)}."
        return Turn(f"Which is larger, {a} or {b}?", answer, f"{max(a, b)} > {min(a, b)}.")
    x, y, z = rng.sample(NAMES, 3)
    word, other = rng.choice([("older", "oldest"), ("taller", "tallest"), ("faster", "fastest")])
    asked = f"{x} is {word} than {y}. {y} is {word} than {z}. Who is the {other}?"
    return Turn(asked, f"{x} is the {other}.", f"{x} > {y} and {y} > {z}, so {x} > {y} > {z}.")


def _knowledge(rng: Random) -> Turn:
    kind = rng.randrange(7)
    if kind == 0:
        land, city = rng.choice(list(CAPITALS.items()))
        return Turn(f"What is the capital of {land}?", f"The capital of {land} is {city}.", f"{land}: {city}.")  # fmt: skip
    if kind == 1:
        a, b = rng.choice(OPPOSITES)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return Turn(
            f"What is the opposite of {a}?", f"The opposite of {a} is {b}.", f"{a} and {b}."
        )
    if kind == 2:
        animal, sound = rng.choice(list(SOUNDS.items()))
        return Turn(f"What does {article(animal)} say?", sound)
    if kind == 3:
        word, told = rng.choice(list(FACTS.items()))
        asked = rng.choice((f"What is {article(word)}?", f"Tell me about the {word}."))
        return Turn(asked, told)
    if kind == 4:
        day = rng.randrange(7)
        after = DAYS[(day + 1) % 7]
        return Turn(f"Which day comes after {DAYS[day]}?", f"{after} comes after {DAYS[day]}.", f"{DAYS[day]}, {after}.")  # fmt: skip
    if kind == 5:
        month = rng.randrange(12)
        after = MONTHS[(month + 1) % 12]
        return Turn(f"Which month comes after {MONTHS[month]}?", f"{after} comes after {MONTHS[month]}.", f"{MONTHS[month]}, {after}.")  # fmt: skip
    first = rng.randint(1, 15)
    stop = first + rng.randint(2, 8)
    count = ", ".join(map(str, range(first, stop + 1)))
    return Turn(f"Count from {first} to {stop}.", f"{count}.")


def _lists(rng: Random) -> Turn:
    word, pool = rng.choice(
        [("animals", ANIMALS), ("colours", COLOURS), ("places", PLACES), ("things to eat", FOODS)]
    )
    some = rng.sample(pool, rng.randint(2, 5))
    number = ("two", "three", "four", "five")[len(some) - 2]
    return Turn(f"Name {number} {word}.", ", ".join(some) + ".")


KINDS: tuple[Callable[[Random], Turn], ...] = (
    _greeting, _story, _about_story, _sum, _sum, _word_problem, _compare, _knowledge, _knowledge,
    _lists,
)  # fmt: skip


def talk(rng: Random) -> Dialogue:
    """One to four exchanges; in thinking mode the last one thinks first."""
    turns = [rng.choice(KINDS)(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    system = rng.choice(_SYSTEMS) if rng.random() < 0.25 else ""
    for turn in turns[:-1]:
        turn.thought = None
    last = turns[-1]
    if last.thought is not None and rng.random() < 0.5:
        last.thought = None
    elif last.thought is None and rng.random() < 0.3:
        last.thought = rng.choice(("I answer politely.", "This is easy.", "I think of an answer."))
    if last.thought is not None and rng.random() < 0.1:
        system = _MAX_EFFORT + system
    return Dialogue(turns, system)
