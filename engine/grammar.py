"""Which tokens a grammar lets come next; the library is llguidance.

Compiling takes threads of its own and is bounded; what a row may draw is a pure function of the
grammar and the request's own tokens, so a replayed, preempted or verified request gets what it
would have got. Matchers are kept only to save work. Legend: V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import llguidance
import numpy as np
import torch
from torch import Tensor

from whalepod.engine.grammar_rules import compiled, tokenizer_of
from whalepod.engine.request import Grammar, Sampling
from whalepod.errors import RequestError

_COMPILED, _WALKS = 256, 512
# Tokens a kept matcher may have to take back: drafts that were wrong, and some.
_BACK = 8


class _Walk:
    """A matcher and the tokens it has taken."""

    __slots__ = ("matcher", "tokens")

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher, self.tokens = matcher, tuple[int, ...]()

    def behind(self, tokens: tuple[int, ...]) -> int | None:
        """How many tokens to take back until the rest begins `tokens`; None for too many."""
        known = len(self.tokens)
        for back in range(min(_BACK, known) + 1):
            if tokens[: known - back] == self.tokens[: known - back]:
                return back
        return None

    def go(self, tokens: tuple[int, ...], back: int) -> bool:
        """Move to behind `tokens`; False when the grammar does not take them."""
        if back:
            self.matcher.rollback(back)
            self.tokens = self.tokens[:-back]
        rest = tokens[len(self.tokens) :]
        taken = self.matcher.try_consume_tokens(list(rest)) if rest else 0
        self.tokens += rest[:taken]
        return taken == len(rest)


class Grammars:
    """Compiled grammars of one tokenizer. `prepare` may be called from any thread.

    Args:
        read: gives the text of `tokenizer.json`; called once, by the first to compile.
        vocab_size: width of the logits.
        eos: the token that ends a text; it may come where the grammar may end.
    """

    def __init__(self, read: Callable[[], str], vocab_size: int, eos: int) -> None:
        self._read, self.vocab_size, self.eos = read, vocab_size, eos
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(2, "grammar")
        self._lock, self._loading = Lock(), Lock()
        self._compiled: OrderedDict[tuple[str, str], Future[llguidance.LLMatcher]] = OrderedDict()
        self._walks: OrderedDict[tuple[str, str, int], list[_Walk]] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, vocab_size: int, eos: int) -> Grammars | None:
        """Use a checkpoint's tokenizer; None when it has none."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        return cls(lambda: path.read_text(encoding="utf-8"), vocab_size, eos)

    def prepare(self, grammar: Grammar) -> Future[llguidance.LLMatcher]:
        """Have a grammar compiled; the result raises RequestError when it cannot be used."""
        key = grammar.kind, grammar.text
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._pool.submit(self._compile, grammar)
                if len(self._compiled) > _COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
        return found

    def allowed(self, settings: Sampling, tokens: tuple[int, ...]) -> Tensor | None:
        """Which tokens may come after the generated `tokens`.

        Args:
            settings: with a grammar in `adjust`.

        Returns:
            `[V]` bool on the CPU, at least one True; None when the grammar asks for more work
            than its limits allow. Behind tokens that the grammar does not take (a wrong draft's
            row, which nobody reads) all may come.
        """
        assert settings.adjust is not None
        assert settings.adjust.grammar is not None
        grammar = settings.adjust.grammar
        if grammar.after >= 0:
            if grammar.after not in tokens:
                return torch.arange(self.vocab_size) != self.eos
            tokens = tokens[tokens.index(grammar.after) + 1 :]
        if self.eos in tokens:
            return torch.arange(self.vocab_size) == self.eos
        walk = self._reach(grammar, settings.seed, tokens)
        if walk is None:
            return torch.ones(self.vocab_size, dtype=torch.bool)
        matcher = walk.matcher
        if matcher.is_stopped() and not matcher.is_error():
            return torch.arange(self.vocab_size) == self.eos
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little", count=self.vocab_size).astype(bool)
        if matcher.is_error() or not mask.any():
            self._walks.pop((grammar.kind, grammar.text, settings.seed), None)
            return None
        return torch.from_numpy(mask)

    def _reach(self, grammar: Grammar, seed: int, tokens: tuple[int, ...]) -> _Walk | None:
        # Requests of equal seeds are rare but for equal ones, so a list holds one walk as a rule.
        key = grammar.kind, grammar.text, seed
        walks = self._walks.setdefault(key, [])
        self._walks.move_to_end(key)
        for walk in walks:
            back = walk.behind(tokens)
            if back is not None:
                return walk if walk.go(tokens, back) else None
        walk = _Walk(self.prepare(grammar).result().deep_copy())
        walks.insert(0, walk)
        del walks[_BACK:]
        if len(self._walks) > _WALKS:
            self._walks.popitem(last=False)
        return walk if walk.go(tokens, 0) else None

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = tokenizer_of(self._read(), self.vocab_size, self.eos)
        try:
            return compiled(self._tokenizer, grammar.kind, grammar.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(str(error), "structured_outputs") from None
