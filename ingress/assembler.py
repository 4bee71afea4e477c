"""From tokens to text deltas: whole characters, stop strings held back, markers left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from whalepod.engine.request import TokenEvent
from whalepod.ingress.stops import StopStrings
from whalepod.model.chat import ReasoningSplitter

Finish = Literal["stop", "length"]


class Decoder(Protocol):
    """Decodes one stream of ids, giving out whole characters only."""

    def push(self, token_id: int) -> str:
        """Take an id; returns the text that is now certain."""
        ...

    def flush(self) -> str:
        """Give out what is left."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token's log-probability, and the most probable tokens in its place with theirs.

    A prompt's first token has none.
    """

    token: int
    logprob: float | None = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text (and the tokens behind it) of a choice; `finish` is set on the last one of a choice.

    `chosen` has an element for every token.
    """

    content: str = ""
    reasoning: str = ""
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    chosen: tuple[Chosen, ...] = ()
    index: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell a client."""
        return not (self.content or self.reasoning or self.tokens or self.finish)


class Assembler:
    """The text of one request, token by token.

    Args:
        decoder: None when the checkpoint has no tokenizer; deltas then carry tokens alone.
        stop: strings that end the text and are no part of it.
        splitter: tells reasoning from content; None for a plain completion.
        index: the choice that this is.
    """

    def __init__(
        self,
        decoder: Decoder | None,
        stop: tuple[str, ...],
        splitter: ReasoningSplitter | None,
        index: int = 0,
    ) -> None:
        self._decoder, self._splitter, self._index = decoder, splitter, index
        self._stops = StopStrings(stop)
        self._chosen: list[Chosen] = []

    def push(self, event: TokenEvent, finish: Finish | None, is_end: bool) -> Delta:
        """Take a token. A delta with `finish` set is the last, whatever the engine has to add.

        Args:
            finish: the engine's verdict with this token.
            is_end: the token is the stop id that ended the text; it is no text itself.
        """
        token = event.token
        self._chosen.append(Chosen(token, event.logprob, event.alternatives))
        if self._decoder is None:
            return self._delta("", "", finish)
        reasoning, content = "", ""
        thought = self._splitter is not None and self._splitter.reasoning
        text, met = "", False
        if not is_end:
            kind = self._splitter.push(token) if self._splitter is not None else "content"
            if kind == "mark":
                # The channel may end here: what it still holds belongs to it.
                text, met = self._drain(self._decoder)
            else:
                text, met = self._stops.push(self._decoder.push(token))
        if finish is not None and not met:
            rest, met = self._drain(self._decoder)
            text += rest
        if thought:
            reasoning = text
        else:
            content = text
        return self._delta(reasoning, content, "stop" if met else finish)

    def _drain(self, decoder: Decoder) -> tuple[str, bool]:
        text, met = self._stops.push(decoder.flush())
        return (text, True) if met else (text + self._stops.flush(), False)

    def _delta(self, reasoning: str, content: str, finish: Finish | None) -> Delta:
        chosen: tuple[Chosen, ...] = ()
        # Tokens whose text is held back travel with the text that follows.
        if reasoning or content or finish or self._decoder is None:
            chosen = tuple(self._chosen)
            self._chosen.clear()
        tokens = tuple(c.token for c in chosen)
        return Delta(content, reasoning, tokens, finish, chosen, self._index)


def added(deltas: Sequence[Delta]) -> Delta:
    """All deltas of one choice as one."""
    return Delta(
        "".join(d.content for d in deltas),
        "".join(d.reasoning for d in deltas),
        tuple(t for d in deltas for t in d.tokens),
        deltas[-1].finish,
        tuple(c for d in deltas for c in d.chosen),
        deltas[-1].index,
    )
