"""Short stories: a plot, its people and things kept straight from beginning to end."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo.documents.words import (
    ANIMALS,
    BOYS,
    COLOURS,
    DISHES,
    FRUITS,
    GIRLS,
    JOBS,
    MOODS,
    NAMES,
    PLACES,
    THINGS,
    WEATHER,
    article,
    invented,
)


@dataclass
class Story:
    """The text and what it is about."""

    text: str
    hero: str
    friend: str
    animal: str
    thing: str
    place: str


class Cast:
    """Who and what a story has; attribute names are the templates' fields."""

    def __init__(self, rng: Random, hero: str = "", animal: str = "", place: str = "") -> None:
        self.hero = hero or (invented(rng) if rng.random() < 0.1 else rng.choice(NAMES))
        self.friend = rng.choice([n for n in NAMES if n != self.hero])
        girl = self.hero in GIRLS or (self.hero not in BOYS and rng.random() < 0.5)
        self.he, self.him, self.his = ("she", "her", "her") if girl else ("he", "him", "his")
        self.He = self.he.capitalize()
        self.child = "girl" if girl else "boy"
        other = self.friend in GIRLS
        self.fhe, self.fhis = ("she", "her") if other else ("he", "his")
        self.animal = animal or rng.choice(ANIMALS)
        self.colour = rng.choice(COLOURS)
        self.thing = rng.choice(THINGS)
        self.place = place or rng.choice(PLACES)
        self.far = rng.choice([p for p in PLACES if p != self.place])
        self.mood, self.mood2 = rng.sample(MOODS, 2)
        self.amood, self.aanimal = article(self.mood), article(self.animal)
        self.acolour = article(self.colour)
        self.weather = rng.choice(WEATHER)
        self.food, self.food2 = rng.sample(DISHES, 2)
        fruit, self.fruits = rng.choice(list(FRUITS.items()))
        self.fruit, self.afruit = fruit, article(fruit)
        self.job = rng.choice(JOBS)
        self.ajob = article(self.job)


# A plot is a list of places in the story; each offers ways to say what happens there. An empty
# string leaves the place out.
_LOST = [
    [
        "{hero} was {amood} {child} who lived near the {place}.",
        "Once upon a time there was {amood} {child} called {hero}, who lived near the {place}.",
        "In a house by the {place} lived {amood} {child}. {He} was called {hero}.",
    ],
    [
        "{He} had {acolour} {thing} and took it everywhere.",
        "More than anything else {he} loved {his} {colour} {thing}.",
        "{His} grandmother had given {him} {acolour} {thing}.",
    ],
    [
        "One {weather} morning the {thing} was gone.",
        "But one {weather} day {hero} could not find the {thing}.",
    ],
    [
        '"Have you seen my {thing}?" {he} asked {friend}. "No," said {friend}, "but I will help you."',
        '{He} ran to {friend}. "My {colour} {thing} is lost!" {he} cried.',
        "{He} told {friend} about it, and they began to look for it together.",
    ],
    [
        "They looked in the {place}, but it was not there.",
        "They looked under every stone and behind every tree.",
        "First they went to the {place} and found nothing.",
        "",
    ],
    [
        "Then they met {aanimal} near the {far}.",
        "On the way to the {far} they saw {aanimal}.",
        "After a while {aanimal} came out of the {far}.",
    ],
    [
        "The {animal} was sitting on the {thing}!",
        "The {animal} had the {colour} {thing} and did not want to give it back.",
        '"I found your {thing}," said the {animal}, "and I kept it safe for you."',
    ],
    [
        "{hero} gave the {animal} some {food}, and the {animal} gave {him} the {thing}.",
        '"Thank you," said {hero}, and gave the {animal} a piece of {food}.',
        "{friend} laughed, and {hero} laughed too.",
    ],
    [
        "From that day on, {hero} and the {animal} were good friends.",
        "In the end {hero} had {his} {thing} again, and everyone was happy.",
        "That night {hero} slept well, with the {colour} {thing} beside {him}.",
    ],
]
_HELP = [
    [
        "It was a {weather} day, and {hero} was walking to the {place}.",
        "On a {weather} evening {hero} went to the {place} to fetch some {food}.",
    ],
    [
        "Near the {far} {he} heard a small sound.",
        "Suddenly {he} heard someone cry behind the {far}.",
    ],
    [
        "It was {aanimal} that had hurt its leg.",
        "There sat {aanimal}, wet and cold and very hungry.",
        "{Aanimal} had fallen into a hole and could not get out.",
    ],
    [
        '"Do not be afraid," said {hero}. "I will help you."',
        "{hero} was afraid at first, but {he} wanted to help.",
        '"Poor {animal}!" said {hero}.',
    ],
    [
        "{He} took the {animal} home and gave it {food} and {food2}.",
        "{He} ran to get {friend}, and together they carried the {animal} home.",
        "{He} put {his} coat around the {animal} and gave it some {food}.",
    ],
    [
        "After three days the {animal} could run again.",
        "Soon the {animal} was well and strong.",
        "In the morning the {animal} felt much better.",
    ],
    [
        "Many weeks later {hero} lost {his} way in the {place}.",
        "One night a great storm came, and {hero} could not find the way home.",
        "Then winter came, and there was nothing left to eat.",
    ],
    [
        "But the {animal} remembered {him} and showed {him} the way.",
        "Then the {animal} came back and brought {him} {acolour} {thing}.",
        "The {animal} came to {his} door, and this time it was the {animal} that helped.",
    ],
    [
        '"You helped me," said the {animal}, "and now I help you."',
        "So {hero} learned that a kind deed is never lost.",
        "{hero} and the {animal} lived happily together.",
    ],
]
_JOURNEY = [
    [
        "Long ago there lived {ajob} called {hero}.",
        "{hero} was {ajob} in a small village by the {place}.",
    ],
    [
        "{He} worked hard, but {he} was poor.",
        "Every morning {he} got up early and went to work.",
        "Everybody in the village liked {him}, because {he} was {mood}.",
    ],
    [
        "One day {aanimal} came to {his} door and spoke to {him}.",
        "One night {he} dreamed of {acolour} {thing} that lay in the {far}.",
        "One {weather} morning {he} found a letter under the door.",
    ],
    [
        '"Go to the {far}," it said, "and you will find {acolour} {thing}."',
        "{He} heard a voice say: the {colour} {thing} is in the {far}.",
    ],
    [
        "So {he} took some {food} and went on {his} way.",
        '"I will go," said {hero}, and took {his} hat.',
        "{friend} did not believe it, but {hero} went all the same.",
    ],
    [
        "{He} walked for two days and two nights.",
        "The way was long, and it was {weather}.",
        "{He} crossed the hill and the river, and {he} was very tired.",
    ],
    [
        "At last {he} came to the {far}, and there was the {thing}.",
        "In the {far} {he} found the {colour} {thing} behind an old door.",
    ],
    [
        "When {he} touched it, it began to shine.",
        "Under the {thing} lay a hundred gold coins.",
        "Beside it sat {friend}, who had come by another way.",
    ],
    [
        "{He} went home and gave half of it to {friend}.",
        "{hero} took it home, and {he} was never poor again.",
        "And {he} told the story to everyone who wanted to hear it.",
    ],
]
_CONTEST = [
    [
        "{hero} and {friend} were friends, but they could not agree on one thing.",
        "One day {hero} and {friend} had a quarrel.",
    ],
    [
        "Each of them wanted to have the {colour} {thing}.",
        '"I am faster than you," said {hero}. "No, I am faster," said {friend}.',
        "Each of them said that the {animal} was theirs.",
    ],
    [
        '"Let us run to the {place}," said {friend}. "Whoever gets there first has won."',
        "So they went to the {mood2} {job} and asked for advice.",
    ],
    [
        "They ran as fast as they could.",
        "All the children of the village came to look.",
        "It was a {weather} day, and the way was wet.",
    ],
    [
        "On the way {friend} fell and hurt {fhis} foot.",
        "Halfway there {friend} stopped, because {fhe} saw {aanimal} in the river.",
    ],
    [
        "{hero} could have won, but {he} turned back to help {friend}.",
        "When {hero} saw it, {he} stopped too and took {friend} by the hand.",
    ],
    [
        "They came to the {place} together, and nobody had lost.",
        '"You are a true friend," said {friend}.',
    ],
    [
        "Then they shared the {food}, and the quarrel was forgotten.",
        "After that they never quarrelled again.",
        "The {job} smiled and gave each of them a piece of {food}.",
    ],
]
_COOK = [
    [
        "{hero} wanted to make {afruit} pie for {friend}.",
        "It was the birthday of {friend}, and {hero} wanted to bake a cake.",
    ],
    [
        "{He} went to the market and bought {fruits} and {food2}.",
        "{He} looked in the kitchen, but there were no {fruits}.",
    ],
    [
        "On the way home {he} met {aanimal}.",
        "In front of the {place} sat {aanimal}.",
    ],
    [
        '"I am so hungry," said the {animal}.',
        "The {animal} looked at the {fruits} and said nothing.",
    ],
    [
        "{hero} gave the {animal} half of the {fruits}.",
        '"Come with me," said {hero}, "there is enough for three."',
    ],
    [
        "Then {he} baked the pie, and the whole house smelled good.",
        "At home they cooked together, and it was great fun.",
    ],
    [
        "{friend} came in the evening and brought {acolour} {thing}.",
        "When {friend} came, the table was ready.",
    ],
    [
        "They ate until nothing was left, and the {animal} fell asleep under the table.",
        '"This is the best pie in the world," said {friend}.',
        "It was the best birthday of all.",
    ],
]
PLOTS = (_LOST, _HELP, _JOURNEY, _CONTEST, _COOK)
TITLES = ("The {colour} {thing}", "{hero} and the {animal}", "The {animal} of the {far}")


def story(rng: Random, hero: str = "", animal: str = "", place: str = "") -> Story:
    """Make a story; `hero`, `animal` and `place` are free unless named."""
    cast = Cast(rng, hero, animal, place)
    fields = {**vars(cast), "Aanimal": cast.aanimal.capitalize(), "His": cast.his.capitalize()}
    said = [rng.choice(ways).format(**fields) for ways in rng.choice(PLOTS)]
    text = " ".join(sentence for sentence in said if sentence)
    return Story(text, cast.hero, cast.friend, cast.animal, cast.thing, cast.place)


def title(rng: Random) -> str:
    """A story with a title above it."""
    cast = Cast(rng)
    told = story(rng, cast.hero, cast.animal)
    return f"{rng.choice(TITLES).format(**vars(cast))}\n\n{told.text}"
