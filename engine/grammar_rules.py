"""How a grammar becomes a matcher, and the process that tries unknown ones first.

The library bounds most of its work, but not all: some rules exhaust its stack or compute for
minutes. So what a client sends is compiled and walked in a process of its own, which may die.
This file imports nothing of whalepod, so that the process starts fast.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

# Work, not time, is what the library counts, so all members agree on what is too much.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Counted repetitions beyond these can take the library very long, at any token.
MAX_REPEAT, MAX_LENGTH = 1000, 10_000
NAMES = {"json": "JSON schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
# Between the parts of a JSON text: a space, or a new line with its indentation; never without end.
_SPACE = r"( |\n {0,24})?"
_COUNTED = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# The trial walks so often, so far.
_WALKS, _STEPS = 4, 24
# Longest for one token: others wait for it. A usual one takes 0.1 ms.
_MASK_S = 0.1
_MEMORY = 4 << 30
# A quarter of what a thread has where the grammar is used afterwards.
_STACK = 2 << 20


def tokenizer_of(data: str, vocab_size: int, eos: int) -> llguidance.LLTokenizer:
    """Read `tokenizer.json`'s text."""
    return llguidance.LLTokenizer(data, n_vocab=vocab_size, eos_token=eos)


def compiled(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> llguidance.LLMatcher:
    """Compile a grammar, its first mask included. Raises ValueError that says what is wrong."""
    try:
        matcher = llguidance.LLMatcher(tokenizer, _source(kind, text), log_level=0, limits=LIMITS)
    except ValueError as error:
        raise ValueError(f"the {NAMES[kind]} cannot be read: {_short(str(error))}") from None
    except Exception as error:  # what the library's readers raise is not declared
        raise ValueError(f"the {NAMES[kind]} cannot be read: {_short(repr(error))}") from None
    if not matcher.is_error() and not matcher.is_stopped():
        # Builds much of the automaton, here and not between two steps.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"the {NAMES[kind]} cannot be used: {_short(matcher.get_error())}")
    return matcher


def _source(kind: str, text: str) -> str:
    if kind == "json":
        _check_schema(json.loads(text))
        return llguidance.LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": _SPACE, "lenient": False}
        )
    if kind == "choice":
        words = (json.dumps(word) for word in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark(f"start: {' | '.join(words)}")
    _check_repeats(text)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    return llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(text) if "::=" in text else text)


def _check_schema(schema: Any) -> None:
    for name, value in _entries(schema):
        if name in _COUNTED and isinstance(value, (int, float)) and value > MAX_LENGTH:
            raise ValueError(f"{name} is {value:g}; it may be {MAX_LENGTH}")
        if name in ("pattern", "patternProperties"):
            for pattern in [value] if isinstance(value, str) else list(value):
                _check_repeats(str(pattern))
        if name == "%lark":
            _check_repeats(str(value))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All names in a JSON text with their values, however deep."""
    open_ = [value]
    while open_:
        value = open_.pop()
        if isinstance(value, dict):
            yield from value.items()
            open_ += value.values()
        elif isinstance(value, list):
            open_ += value


def _check_repeats(text: str) -> None:
    for count in re.findall(r"[{,~]\s*([0-9]{4,})(?=\s*[,}]|\s*\.\.)", text):
        if int(count[:9]) > MAX_REPEAT:
            raise ValueError(f"it repeats something {count[:20]} times; it may {MAX_REPEAT} times")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:397]}..."


def walk(matcher: llguidance.LLMatcher, vocab_size: int) -> None:
    """Follow a grammar some ways. Raises ValueError where it takes too much work."""
    for seed in range(_WALKS):
        rng, here = random.Random(seed), matcher.deep_copy()
        for _ in range(_STEPS):
            if here.is_stopped():
                break
            begun = time.thread_time()
            bits = int.from_bytes(here.compute_bitmask(), "little") & ((1 << vocab_size) - 1)
            if time.thread_time() - begun > _MASK_S:
                raise ValueError(f"a token of it takes more than {_MASK_S:g} s; simplify it")
            if here.is_error() or not bits:
                raise ValueError(
                    f"some of the texts it asks for cannot be made: {_short(here.get_error())}"
                )
            # Tokens by chance: look upwards from a random one, else take the lowest.
            above = bits >> (start := rng.randrange(vocab_size))
            token = start + (above & -above).bit_length() - 1 if above else -1
            token = token if above else (bits & -bits).bit_length() - 1
            if not here.try_consume_tokens([token]):
                break  # the end of the text


def main() -> None:
    """Read the tokenizer, then grammars, a line of JSON each; answer each with a line."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data, vocab_size, eos = json.loads(sys.stdin.readline())
    tokenizer = tokenizer_of(data, vocab_size, eos)
    for line in sys.stdin:
        kind, text = json.loads(line)
        problem = None
        try:
            walk(compiled(tokenizer, kind, text), vocab_size)
        except (ValueError, RecursionError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    threading.stack_size(_STACK)
    threading.Thread(target=main).start()
