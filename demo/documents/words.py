"""The vocabulary of the generated documents."""

from __future__ import annotations

from random import Random

GIRLS = (
    "Anna Clara Emma Grace Iris Kate Mary Olive Rose Vera Alice Bella Daisy Ella Flora Hanna "
    "Ida Julia Laura Maya Nora Paula Ruth Sara Tina Wilma Zoe Martha Lucy Jane Helen Eva Dora "
    "Agnes"
).split()
BOYS = (
    "Ben David Frank Henry Jack Leo Noah Paul Sam Tom Adam Bruno Carl Dan Edgar Felix George "
    "Hugo Ivan John Karl Louis Max Ned Oscar Peter Robert Simon Theo Victor Walter Arthur "
    "Oliver Jim"
).split()
NAMES = GIRLS + BOYS
ANIMALS = (
    "cat dog fox bear rabbit owl horse mouse frog duck goose lamb goat crow hedgehog squirrel "
    "swan pony donkey badger otter seal whale turtle robin beaver kitten puppy deer wolf"
).split()
COLOURS = "red blue green yellow black white brown grey golden silver purple orange pink".split()
PLACES = (
    "garden forest village market kitchen school river hill meadow barn harbour library mill "
    "orchard castle beach station church bakery workshop lighthouse bridge cellar attic"
).split()
THINGS = (
    "ball key lamp book boat kite hat coin basket drum bell cup box ring scarf map spoon "
    "clock mirror candle ladder whistle blanket button letter stone feather rope bucket "
    "bottle coat brush pen knife flute chair wheel jar glove purse"
).split()
MOODS = "little old young happy sad brave quiet clever kind shy lazy busy curious gentle".split()
WEATHER = "sunny rainy windy cold warm snowy cloudy foggy".split()
DISHES = "bread cheese soup cake honey rice fish porridge butter tea milk".split()
FRUITS = {
    "apple": "apples", "pear": "pears", "plum": "plums", "carrot": "carrots", "onion": "onions",
    "potato": "potatoes", "berry": "berries", "cherry": "cherries", "nut": "nuts", "egg": "eggs",
}  # fmt: skip
FOODS = DISHES + list(FRUITS)
JOBS = (
    "baker farmer teacher doctor sailor miller painter singer tailor gardener smith carpenter "
    "fisherman shepherd cook driver writer judge nurse pilot"
).split()
CAPITALS = {
    "England": "London",
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "India": "Delhi",
    "Belgium": "Brussels",
}
CITIES = list(CAPITALS.values())
# Never named in a training document's tool call.
HELD_OUT_CITIES = ["Lisbon", "Athens", "Dublin", "Havana", "Nairobi"]
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("happy", "sad"), ("day", "night"),
    ("up", "down"), ("long", "short"), ("open", "closed"), ("light", "dark"), ("fast", "slow"),
    ("rich", "poor"), ("full", "empty"), ("early", "late"), ("strong", "weak"), ("near", "far"),
    ("wet", "dry"), ("loud", "quiet"), ("good", "bad"), ("high", "low"), ("first", "last"),
]  # fmt: skip
SOUNDS = {
    "cat": "It says meow.", "dog": "It barks.", "duck": "It says quack.", "lamb": "It says baa.",
    "owl": "It hoots at night.", "frog": "It croaks.", "horse": "It neighs.", "crow": "It caws.",
    "wolf": "It howls at the moon.", "mouse": "It squeaks.", "whale": "It sings under water.",
    "goose": "It honks.", "donkey": "It brays.", "bear": "It growls.",
}  # fmt: skip
FACTS = {
    "whale": "A whale is a very large animal that lives in the sea and breathes air.",
    "otter": "An otter is a small animal that swims well and eats fish.",
    "owl": "An owl is a bird that hunts at night.",
    "bee": "A bee is a small insect that makes honey.",
    "rose": "A rose is a flower with thorns and a sweet smell.",
    "bridge": "A bridge is a road that crosses a river or a valley.",
    "clock": "A clock is a thing that shows the time.",
    "library": "A library is a place where people read and borrow books.",
    "baker": "A baker is a person who makes bread and cakes.",
    "river": "A river is water that flows through the land to the sea.",
    "moon": "The moon is a ball of rock that goes around the earth.",
    "sun": "The sun is a star. It gives us light and warmth.",
    "winter": "Winter is the coldest season of the year.",
    "harbour": "A harbour is a safe place where ships lie.",
    "lighthouse": "A lighthouse is a tower with a light that guides ships at night.",
    "map": "A map is a picture of a country or a town seen from above.",
    "turtle": "A turtle is a slow animal with a hard shell.",
    "pod": "A pod is a group of whales that swim together.",
}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)


_STARTS = "B Br C Cl D Dr F Fl G Gr H J K L M N P Pr Qu R S St T Tr V W Z".split()
_MIDDLES = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "o", "u"]
_JOINS = "l m n r s t v d b nd rn lm st rt lv".split()
_ENDS = "a en o in el ow ia ford ton by um is or ey ick".split()


def invented(rng: Random) -> str:
    """A name that nobody has; what stands for it can only be copied."""
    return "".join(rng.choice(part) for part in (_STARTS, _MIDDLES, _JOINS, _ENDS))


def article(word: str) -> str:
    """`a` or `an`, with the word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
