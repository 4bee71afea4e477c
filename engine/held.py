"""Requests whose grammars are being compiled: they wait beside the queue, and nobody behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from whalepod.engine.grammar import Grammars
from whalepod.engine.request import Grammar, Request, Sequence
from whalepod.errors import RequestError


def grammar_of(request: Request) -> Grammar | None:
    """What a request's text has to be, if it has to be something."""
    adjust = request.sampling.adjust
    return adjust.grammar if adjust is not None else None


class Held:
    """Sequences of one engine loop that cannot be queued yet.

    Args:
        grammars: compiles; None where the checkpoint has no tokenizer.
        wake: called, from any thread, when one of them can be.
    """

    def __init__(self, grammars: Grammars | None, wake: Callable[[], None]) -> None:
        self.grammars, self._wake = grammars, wake
        self._waiting: dict[str, tuple[Sequence, Future[Any]]] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether one of them waits no longer."""
        return any(future.done() for _, future in self._waiting.values())

    def check(self, request: Request) -> None:
        """Raise RequestError where a grammar cannot be followed; begin to compile it otherwise."""
        grammar = grammar_of(request)
        if grammar is None:
            return
        if self.grammars is None:
            raise RequestError(
                "this checkpoint has no tokenizer, so structured output cannot be made",
                "structured_outputs",
            )
        self.grammars.prepare(grammar)

    def holds(self, sequence: Sequence) -> bool:
        """Keep a sequence here if its grammar is not compiled yet."""
        grammar = grammar_of(sequence.request)
        if grammar is None:
            return False
        assert self.grammars is not None
        future = self.grammars.prepare(grammar)
        if future.done() and future.exception() is None:
            return False
        self._waiting[sequence.request.id] = sequence, future
        future.add_done_callback(lambda _: self._wake())
        return True

    def take(self) -> Iterator[tuple[Sequence, str | None]]:
        """Give out those that wait no longer, with the reason if they can never run."""
        for name, (sequence, future) in list(self._waiting.items()):
            if future.done():
                del self._waiting[name]
                error = future.exception()
                yield sequence, None if error is None else str(error)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, held or not."""
        self._waiting.pop(sequence.request.id, None)
