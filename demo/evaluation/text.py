"""What the model writes: samples, answers, tool calls, and how many drafts it would accept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from demo.documents.protocol import END_THINK, EOS, Dialogue
from demo.documents.tools import tool_talk
from whalepod.config import Config
from whalepod.engine.local import open_engine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source as Weights
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.tokenizer import Tokenizer
from whalepod.model.whole import WholeModel

# Fixed; half of them conversations, half the beginning of a text.
PROMPTS = (
    "<｜User｜>Tell me a story about Nora and a whale.<｜Assistant｜></think>",
    "<｜User｜>Please tell me a story about Walter.<｜Assistant｜></think>",
    "<｜User｜>What can you do?<｜Assistant｜></think>",
    "<｜User｜>What is an owl?<｜Assistant｜></think>",
    "<｜User｜>What is 46 plus 38?<｜Assistant｜><think>",
    "Once upon a time there was",
    "The people of the United States",
    "It was a fine morning, and Emma",
    "And the LORD said unto Moses,",
    "The whale",
)
CHAT = "<｜User｜>What is the capital of Norway?<｜Assistant｜></think>"
THINKING = "<｜User｜>Kate has 7 coins. Leo gives Kate 5 coins. How many coins does Kate have now?<｜Assistant｜><think>"  # fmt: skip
_CALL = re.compile(
    r"^\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"(\w+)\">\n(.*)\n</｜DSML｜invoke>\n"
    r"</｜DSML｜tool_calls>$",
    re.S,
)
_PARAMETER = re.compile(
    r"^<｜DSML｜parameter name=\"(\w+)\" string=\"(true|false)\">(.*)</｜DSML｜parameter>$"
)


class Writer:
    """The engine, on texts with markers."""

    def __init__(self, folder: Path) -> None:
        self.config = Config.model_validate(
            {"model": {"path": str(folder)}, "topology": {"layout": "single"}}
        )
        self.checkpoint, tokenizer = Checkpoint.open(folder), Tokenizer.open(folder)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        import tokenizers

        self._marked = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text whose markers are markers."""
        return tuple(self._marked.encode(text, add_special_tokens=False).ids)

    def write(
        self, prompts: list[str], max_tokens: int, temperature: float = 0.0
    ) -> list[tuple[list[int], str, str | None]]:
        """Ids, text and finish reason of each prompt's continuation; seeds are 0, 1, 2, ..."""
        engine = open_engine(self.config, Weights(self.config.model, self.checkpoint))
        requests = [
            Request(str(i), self.ids(p), max_tokens, Sampling(temperature, seed=i), (1,))
            for i, p in enumerate(prompts)
        ]
        ids: list[list[int]] = [[] for _ in prompts]
        finish: list[str | None] = [None] * len(prompts)
        for event in engine.run(requests):
            if event.token >= 0:
                ids[int(event.request_id)].append(event.token)
            finish[int(event.request_id)] = event.finish
        engine.close()
        texts = [self._marked.decode(row, skip_special_tokens=False) for row in ids]
        return [(row, t.removesuffix(EOS), f) for row, t, f in zip(ids, texts, finish, strict=True)]


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a well-formed call; None when anything is out of form."""
    found = _CALL.match(text)
    if found is None:
        return None
    arguments: dict[str, Any] = {}
    for line in found[2].split("\n"):
        parameter = _PARAMETER.match(line)
        if parameter is None:
            return None
        key, is_text, value = parameter.groups()
        try:
            arguments[key] = value if is_text == "true" else json.loads(value)
        except json.JSONDecodeError:
            return None
    return found[1], arguments


def tool_calls(writer: Writer, count: int, seed: int = 10**9) -> dict[str, int]:
    """Held-out requests: how many calls are well formed, and how many are the right call."""
    rng = Random(seed)
    asked: list[Dialogue] = [tool_talk(rng, held_out=True) for _ in range(count)]
    written = writer.write([d.prompt() for d in asked], 160)
    formed = right = 0
    for dialogue, (_, text, finish) in zip(asked, written, strict=True):
        answer = text.split(END_THINK)[-1]
        call = parse_call(answer) if finish == "stop" else None
        formed += call is not None
        right += call is not None and call == parse_call(dialogue.turns[-1].answer)
    return {"prompts": count, "well_formed": formed, "right": right}


def drafts_accepted(writer: Writer, prompts: list[str], max_tokens: int = 120) -> float:
    """Share of greedy tokens that the MTP block's first greedy draft foretells."""
    model = WholeModel(writer.checkpoint.config, writer.checkpoint.everything())
    right = total = 0
    for prompt, (ids, _, _) in zip(prompts, writer.write(prompts, max_tokens), strict=True):
        before = writer.ids(prompt)
        row = [*before, *ids]
        # Row t of the drafts foretells token t + 2.
        drafts = model.mtp_logits(row).argmax(-1).tolist()
        for at in range(len(before) + 1, len(row)):
            total += 1
            right += drafts[at - 2] == row[at]
    return right / total
