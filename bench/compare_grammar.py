"""Compare llguidance and xgrammar: compile time, mask time, what they take, what they need.

xgrammar is no dependency; give the folder it was installed into:
    pip install --no-deps --target /tmp/x xgrammar apache-tvm-ffi
    PYTHONPATH=src:. python bench/compare_grammar.py --xgrammar /tmp/x
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import heading

from whalepod.engine.grammar_rules import LIMITS

MODEL = Path(__file__).parent.parent / "models/demo"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "mail": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.com$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {
        f"field_{i}": {"type": "object", "properties": {"a": {"type": "number"}, "b": PERSON}}
        for i in range(40)
    },
    "additionalProperties": False,
}
DEEP = {
    "$ref": "#/$defs/n",
    "$defs": {
        "n": {
            "type": "object",
            "properties": {
                "v": {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}},
            },
            "required": ["v", "kids"],
            "additionalProperties": False,
        }
    },
}
TEXT = '{"name": "Ishmael of Nantucket", "age": 33, "mail": "ish@pequod.com", "tags": ["red"]}'
KIDS = '{"v": 1.5, "kids": [{"v": "whale", "kids": [{"v": null, "kids": []}]}]}'
FREE = '{"a": [1, 2, {"b": "some text that goes on for a while"}], "c": true}'
WIDE_TEXT = '{"field_0": {"a": 1.25, "b": ' + TEXT + "}}"
LOG = "2026-11-24T04:58:02Z WARN [engine] 17 requests wait"
PATTERN = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z (INFO|WARN|ERROR) \[[a-z]+\] [A-Za-z0-9 ]{1,80}"
CASES = [
    ("any object", "json", '{"type": "object"}', FREE),
    ("person", "json", json.dumps(PERSON), TEXT),
    ("40 x person", "json", json.dumps(WIDE), WIDE_TEXT),
    ("recursive", "json", json.dumps(DEEP), KIDS),
    ("log line", "regex", PATTERN, LOG),
]
FEATURES = {
    "enum, const, $ref": '{"anyOf":[{"enum":[1,"a"]},{"const":null},{"$ref":"#/$defs/x"}],"$defs":{"x":{"type":"boolean"}}}',
    "minimum, maximum": '{"type":"integer","minimum":3,"maximum":9}',
    "multipleOf": '{"type":"integer","multipleOf":3}',
    "minLength, maxLength": '{"type":"string","minLength":2,"maxLength":3}',
    "pattern with length": '{"type":"string","pattern":"^a+$","maxLength":3}',
    "minItems, maxItems": '{"type":"array","items":{"type":"null"},"minItems":1,"maxItems":2}',
    "format: date": '{"type":"string","format":"date"}',
    "oneOf": '{"oneOf":[{"type":"string"},{"type":"null"}]}',
    "allOf": '{"allOf":[{"type":"object","properties":{"a":{"type":"null"}},"required":["a"]},{"type":"object","properties":{"b":{"type":"null"}},"required":["b"]}]}',
    "if": '{"if":{"type":"string"},"then":{"minLength":2}}',
    "not": '{"not":{"type":"string"}}',
    "uniqueItems": '{"type":"array","items":{"enum":[1,2]},"uniqueItems":true}',
}
# A text of each that does not fit: a library that takes it has ignored the keyword.
UNFIT = {
    "enum, const, $ref": '"b"',
    "minimum, maximum": "12",
    "multipleOf": "4",
    "minLength, maxLength": '"abcd"',
    "pattern with length": '"aaaa"',
    "minItems, maxItems": "[]",
    "format: date": '"2026-99-99"',
    "oneOf": "1",
    "allOf": '{"a":null}',
    "if": '"a"',
    "not": '"a"',
    "uniqueItems": "[1,1]",
}


class Guidance:
    """llguidance behind what is measured."""

    name = "llguidance"

    def __init__(self, data: str, size: int) -> None:
        import llguidance

        self.library = llguidance
        self.tokenizer = llguidance.LLTokenizer(data, n_vocab=size, eos_token=1)
        self.to_ids: Callable[[str], list[int]] = self.tokenizer.tokenize_str

    def compile(self, kind: str, text: str) -> Any:
        """Compile a JSON schema or a regex."""
        make = self.library.LLMatcher
        source = make.grammar_from_json_schema(text) if kind == "json" else None
        matcher = make(
            self.tokenizer, source or make.grammar_from_regex(text), log_level=0, limits=LIMITS
        )
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def start(self, compiled: Any) -> Any:
        """A matcher of its own."""
        return compiled.deep_copy()

    def mask(self, matcher: Any) -> None:
        """Compute what may come next."""
        matcher.compute_bitmask()

    def take(self, matcher: Any, token: int) -> bool:
        """Go on by a token."""
        return bool(matcher.try_consume_tokens([token]))

    def done(self, matcher: Any) -> bool:
        """Whether the text may end here."""
        return bool(matcher.is_accepting())


class XGrammar:
    """xgrammar behind the same."""

    name = "xgrammar"

    def __init__(self, vocab: list[str], to_ids: Callable[[str], list[int]]) -> None:
        import xgrammar

        self.library, self.to_ids = xgrammar, to_ids
        info = xgrammar.TokenizerInfo(
            vocab, xgrammar.VocabType.BYTE_LEVEL, vocab_size=len(vocab), stop_token_ids=[1]
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.bits = xgrammar.allocate_token_bitmask(1, len(vocab))

    def compile(self, kind: str, text: str) -> Any:
        """Compile a JSON schema or a regex."""
        if kind == "json":
            return self.compiler.compile_json_schema(text)
        return self.compiler.compile_regex(text)

    def start(self, compiled: Any) -> Any:
        """A matcher of its own."""
        return self.library.GrammarMatcher(compiled)

    def mask(self, matcher: Any) -> None:
        """Compute what may come next."""
        matcher.fill_next_token_bitmask(self.bits)

    def take(self, matcher: Any, token: int) -> bool:
        """Go on by a token."""
        return bool(matcher.accept_token(token))

    def done(self, matcher: Any) -> bool:
        """Whether the text may end here."""
        self.mask(matcher)
        return bool(int(self.bits[0, 0]) >> 1 & 1)


def vocabulary(size: int) -> str:
    """The demo tokenizer, filled up with words that are made by chance to `size` tokens."""
    fields = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, rng = fields["model"]["vocab"], random.Random(1)
    pieces = [w for w in vocab if 1 < len(w) < 7 and w.isascii()]
    at = max(max(vocab.values()), *(t["id"] for t in fields["added_tokens"])) + 1
    while at < size:
        word = rng.choice(("Ġ", "")) + "".join(rng.choices(pieces, k=rng.choice((1, 2, 2, 3))))
        if word not in vocab:
            vocab[word] = at
            at += 1
    return json.dumps(fields)


def words_of(data: str) -> list[str]:
    """Tokens in the order of their ids."""
    fields = json.loads(data)
    found = {i: w for w, i in fields["model"]["vocab"].items()}
    found |= {t["id"]: t["content"] for t in fields["added_tokens"]}
    return [found.get(i, f"<unused{i}>") for i in range(max(found) + 1)]


def measured(library: Any, kind: str, text: str, sample: str) -> tuple[float, float, float]:
    """Seconds to compile (with the first mask), of a median mask, and of the slowest."""
    compiling = []
    for _ in range(5):
        begun = time.perf_counter()
        compiled = library.compile(kind, text)
        library.mask(library.start(compiled))
        compiling.append(time.perf_counter() - begun)
    masks = []
    for _ in range(5):
        matcher = library.start(library.compile(kind, text))
        for token in library.to_ids(sample):
            begun = time.perf_counter()
            library.mask(matcher)
            masks.append(time.perf_counter() - begun)
            if not library.take(matcher, token):
                raise ValueError(f"{library.name} does not take {sample!r}")
    return statistics.median(compiling), statistics.median(masks), max(masks)


def feature(library: Any, schema: str, unfit: str) -> str:
    """Whether a keyword is kept, refused or ignored."""
    try:
        matcher = library.start(library.compile("json", schema))
    except Exception:
        return "refused"
    taken = all(library.take(matcher, t) for t in library.to_ids(unfit))
    return "ignored" if taken and library.done(matcher) else "kept"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--xgrammar", help="folder with xgrammar and tvm_ffi")
    asked = parser.parse_args()
    if asked.xgrammar:
        sys.path.append(asked.xgrammar)
    print(heading("bench/compare_grammar.py"))
    print("\n| vocabulary | grammar | library | compile ms | mask µs, median | mask µs, slowest |")
    print("|---|---|---|---|---|---|")
    libraries: list[Any] = []
    for size in (4096, 129_280):
        data = vocabulary(size)
        words = words_of(data)
        libraries = [Guidance(data, len(words))]
        if asked.xgrammar:
            libraries.append(XGrammar(words, libraries[0].to_ids))
        for name, kind, text, sample in CASES:
            for library in libraries:
                try:
                    a, b, c = measured(library, kind, text, sample)
                    row = f"{a * 1e3:.1f} | {b * 1e6:.0f} | {c * 1e6:.0f}"
                except ValueError as error:
                    row = f"{str(error)[:60]} | |"
                print(f"| {len(words):,} | {name} | {library.name} | {row} |", flush=True)
    print(f"\n| keyword | {' | '.join(x.name for x in libraries)} |")
    print(f"|---|{'---|' * len(libraries)}")
    for name, schema in FEATURES.items():
        cells = " | ".join(feature(x, schema, UNFIT[name]) for x in libraries)
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
