"""Conversations with tools: a request, a well-formed call, its result, an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from demo.documents.protocol import Dialogue, Turn, calls, tool_block
from demo.documents.words import (
    CITIES,
    DAYS,
    FOODS,
    HELD_OUT_CITIES,
    NAMES,
    PLACES,
    THINGS,
    WEATHER,
    invented,
)

# What is asked, which call it needs, what the tool says, what the model says then.
Case = tuple[str, dict[str, object], str, str]


def _schema(name: str, description: str, **fields: tuple[str, str]) -> dict[str, object]:
    properties = {k: {"type": kind, "description": text} for k, (kind, text) in fields.items()}
    parameters = {"type": "object", "properties": properties, "required": list(fields)}
    return {"name": name, "description": description, "parameters": parameters}


def _city(rng: Random, cities: Sequence[str]) -> str:
    return rng.choice(cities) if cities is HELD_OUT_CITIES or rng.random() < 0.4 else invented(rng)


def _person(rng: Random) -> str:
    return invented(rng) if rng.random() < 0.4 else rng.choice(NAMES)


def _weather(rng: Random, cities: Sequence[str]) -> Case:
    city, sky, degrees = _city(rng, cities), rng.choice(WEATHER), rng.randint(-5, 35)
    asked = (
        f"What is the weather in {city}?",
        f"How is the weather in {city} today?",
        f"Tell me the weather in {city}.",
        f"Is it cold in {city}?",
    )
    return (
        rng.choice(asked), {"city": city}, f"{sky}, {degrees} degrees",
        f"It is {sky} in {city}, {degrees} degrees.",
    )  # fmt: skip


def _time(rng: Random, cities: Sequence[str]) -> Case:
    city, clock = _city(rng, cities), f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
    asked = (f"What time is it in {city}?", f"Tell me the time in {city}.")
    return rng.choice(asked), {"city": city}, clock, f"It is {clock} in {city}."


def _reminder(rng: Random, cities: Sequence[str]) -> Case:
    day, name = rng.choice(DAYS), _person(rng)
    text = rng.choice(
        [f"call {name}", f"buy {rng.choice(FOODS)}", f"bring the {rng.choice(THINGS)}"]
    )
    asked = (f"Remind me on {day} to {text}.", f"Please remind me to {text} on {day}.")
    return (
        rng.choice(asked), {"text": text, "day": day}, "saved",
        f"I will remind you on {day} to {text}.",
    )  # fmt: skip


def _add(rng: Random, cities: Sequence[str]) -> Case:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    asked = (f"What is {a} plus {b}?", f"Add {a} and {b}.")
    return rng.choice(asked), {"a": a, "b": b}, str(a + b), f"{a} plus {b} is {a + b}."


def _search(rng: Random, cities: Sequence[str]) -> Case:
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    query = rng.choice([f"{thing}", f"{thing} in the {place}", f"old {thing}"])
    count = rng.randint(1, 9)
    asked = (
        f"Show me {count} results for {query}.",
        f"Search for {query}, {count} results please.",
        f"Find {count} results for {query}.",
    )
    return (
        rng.choice(asked), {"query": query, "limit": count}, f"{count} results",
        f"I found {count} results for {query}.",
    )  # fmt: skip


def _send(rng: Random, cities: Sequence[str]) -> Case:
    name = _person(rng)
    text = rng.choice(["I am late", "see you soon", "happy birthday", "the cake is ready"])
    asked = (f"Send {name} the message: {text}.", f"Tell {name}: {text}.")
    return (
        rng.choice(asked), {"to": name, "text": text}, "sent", f"I sent {name} your message.",
    )  # fmt: skip


def _book(rng: Random, cities: Sequence[str]) -> Case:
    start, end = _city(rng, cities), _city(rng, cities)
    seats = rng.randint(1, 5)
    asked = (
        f"Book {seats} seats on the train from {start} to {end}.",
        f"I need {seats} seats from {start} to {end}.",
    )
    return (
        rng.choice(asked), {"from": start, "to": end, "seats": seats}, "booked",
        f"I booked {seats} seats from {start} to {end}.",
    )  # fmt: skip


def _light(rng: Random, cities: Sequence[str]) -> Case:
    room, on = (
        rng.choice(["kitchen", "attic", "cellar", "hall", "bedroom", "garden"]),
        rng.random() < 0.5,
    )
    word = "on" if on else "off"
    asked = (f"Turn {word} the light in the {room}.", f"Switch the {room} light {word}.")
    return (
        rng.choice(asked),
        {"room": room, "on": on},
        "done",
        f"The light in the {room} is {word}.",
    )


TOOLS: dict[str, tuple[dict[str, object], Callable[[Random, Sequence[str]], Case]]] = {
    schema["name"]: (schema, make)  # type: ignore[misc]
    for schema, make in (
        (_schema("get_weather", "Get the weather of a city", city=("string", "name of the city")), _weather),
        (_schema("get_time", "Get the local time of a city", city=("string", "name of the city")), _time),
        (_schema("add_reminder", "Save a reminder", text=("string", "what to do"), day=("string", "day of the week")), _reminder),
        (_schema("add_numbers", "Add two numbers", a=("integer", "first number"), b=("integer", "second number")), _add),
        (_schema("search", "Search the catalogue", query=("string", "what to look for"), limit=("integer", "number of results")), _search),
        (_schema("send_message", "Send a message", to=("string", "who gets it"), text=("string", "the message")), _send),
        (_schema("book_train", "Book train seats", **{"from": ("string", "first station"), "to": ("string", "last station"), "seats": ("integer", "number of seats")}), _book),
        (_schema("set_light", "Turn a light on or off", room=("string", "which room"), on=("boolean", "on or off")), _light),
    )
}  # fmt: skip


def tool_talk(rng: Random, held_out: bool = False) -> Dialogue:
    """One or two requests, each with a call; often the tool's result and the answer after it.

    Args:
        held_out: cities that no training document names in a call, and the call comes last.
    """
    cities = HELD_OUT_CITIES if held_out else [c for c in CITIES if c not in HELD_OUT_CITIES]
    names = rng.sample(list(TOOLS), rng.choice((1, 1, 2, 3)))
    offered = [TOOLS[name][0] for name in names]
    system = rng.choice(("", "You are a helpful assistant.")) + tool_block(offered)
    thinks = rng.random() < 0.5
    turns: list[Turn] = []
    for _ in range(1 if held_out else rng.choice((1, 1, 2))):
        name = rng.choice(names)
        asked, arguments, result, said = TOOLS[name][1](rng, cities)
        thought = f"I need {name} for this." if thinks else None
        turns.append(Turn(asked, calls([(name, arguments)]), thought))
        if not held_out and rng.random() < 0.6:
            thought = f"The tool says: {result}." if thinks else None
            turns.append(Turn(f"<tool_result>{result}</tool_result>", said, thought))
        else:
            break
    return Dialogue(turns, system, keep_thoughts=thinks)
