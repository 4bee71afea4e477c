"""Seeded documents without end, free of any licence: stories, conversations, tools, recall."""

from __future__ import annotations

from random import Random

from demo.documents.protocol import BOS, EOS
from demo.documents.recall import Filler, recall, stories
from demo.documents.stories import story, title
from demo.documents.talk import talk
from demo.documents.tools import tool_talk

# Share of each kind among the generated documents of a row of short documents.
KINDS = {"story": 0.25, "talk": 0.5, "tools": 0.25}


def document(rng: Random, kind: str | None = None) -> str:
    """One short document with its markers."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "story":
        text = title(rng) if rng.random() < 0.3 else story(rng).text
        return f"{BOS}{text}{EOS}"
    return talk(rng).text() if kind == "talk" else tool_talk(rng).text()


def lesson(rng: Random, chars: int, fill: Filler | None = None) -> str:
    """A recall document of about so many characters; `fill` (stories) stands between the facts."""
    return recall(rng, chars, fill or stories(rng)).text()
