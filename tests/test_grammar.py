"""Masks of grammars against brute force, and matchers that are reached by any way."""

from __future__ import annotations

import itertools
import json
import re
from random import Random

import pytest
import torch
from tokenizers import Tokenizer as Built
from tokenizers import decoders, models, pre_tokenizers

from whalepod.engine.adjust import constrained
from whalepod.engine.grammar import Grammars
from whalepod.engine.request import Adjust, Grammar, Sampling
from whalepod.engine.sampler import sample
from whalepod.engine.step import MicroBatch, Part, Step
from whalepod.errors import RequestError

WORDS = ["<end>", "a", "b", "c", "ab", "ba", "aab", "cc", "bc", "abcab"]
EOS, END_THINK = 0, len(WORDS)
VOCAB = len(WORDS) + 3  # a control token, and two that the tokenizer does not have
LETTERS, FAR = "abc", 5


def tokenizer() -> str:
    merges = [("a", "b"), ("b", "a"), ("a", "ab"), ("c", "c"), ("b", "c"), ("ab", "c")]
    words = [*WORDS[1:], "abc", "</think>"]
    merges += [("abc", "ab")]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<end>", *words[:9], "</think>", "abc"]))}
    built = Built(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<end>", "</think>"])
    return built.to_str()


DATA = tokenizer()
TEXTS = dict(enumerate([*WORDS[1:], "</think>", "abc"], 1)) | {EOS: ""}
TEXTS.pop(END_THINK)


def grammars() -> Grammars:
    return Grammars(lambda: DATA, VOCAB, EOS)


def setting(kind: str, text: str, seed: int = 0, **more: int) -> Sampling:
    return Sampling(seed=seed, adjust=Adjust(grammar=Grammar(kind, text, **more)))  # type: ignore[arg-type]


def ids(found: Grammars, settings: Sampling, tokens: tuple[int, ...]) -> set[int]:
    allowed = found.allowed(settings, tokens)
    assert allowed is not None
    return set(allowed.nonzero().flatten().tolist())


ENDS = ["".join(p) for n in range(FAR + 1) for p in itertools.product(LETTERS, repeat=n)]
PATTERNS = [
    *("abc", "a*", "(ab|ba)+c?", "a{2,4}b", "[ab]*c", "(a|ab)(c|bcab)", "c?(ab)*", "[^a]{1,3}a"),
    *("(a+b)+|cc", "a(b(c|a)?)?", "(aab|abc)*b", "b.b"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_token_may_come_exactly_when_a_match_can_follow(pattern: str) -> None:
    found, matches, rng = grammars(), re.compile(pattern).fullmatch, Random(pattern)
    settings = setting("regex", pattern)
    for _ in range(6):
        text, tokens = "", ()
        for _ in range(5):
            expected = {
                t for t, w in TEXTS.items() if w and any(matches(text + w + e) for e in ENDS)
            } | ({EOS} if matches(text) else set())
            got = ids(found, settings, tokens)
            longest = max((TEXTS[t] for t in expected), key=len)
            if EOS not in expected and all(longest.startswith(TEXTS[t]) for t in expected):
                # One text alone can follow: it is spelled in the tokenizer's own way.
                assert got
                assert got <= expected, text
            else:
                assert got == expected, text
            go_on = sorted(got - {EOS})
            if not go_on:
                break
            token = rng.choice(go_on)
            text, tokens = text + TEXTS[token], (*tokens, token)


def test_a_choice_is_taken_by_the_letter() -> None:
    found = grammars()
    settings = setting("choice", json.dumps(["ab", "abc", "ccb"]))
    assert {TEXTS[i] for i in ids(found, settings, ())} == {"a", "ab", "abc", "c", "cc"}
    assert ids(found, settings, (4,)) == {EOS, 3}
    assert ids(found, settings, (4, 3)) == {EOS}


def test_what_may_come_does_not_depend_on_what_was_asked_before() -> None:
    rng, used = Random(1), grammars()
    for _ in range(120):
        settings = setting("regex", rng.choice(PATTERNS), rng.randrange(2))
        tokens: tuple[int, ...] = ()
        for _ in range(rng.randrange(7)):
            wide = sorted(ids(used, settings, tokens) - {EOS})
            # A wrong draft now and then, which goes nowhere.
            guess = (*tokens, rng.randrange(VOCAB))
            assert used.allowed(settings, guess) is not None
            if not wide:
                break
            tokens = (*tokens, rng.choice(wide))
        assert ids(used, settings, tokens) == ids(grammars(), settings, tokens)


def test_behind_the_end_only_the_end_may_come() -> None:
    assert ids(grammars(), setting("regex", "a*"), (1, EOS)) == {EOS}
    assert ids(grammars(), setting("regex", "a*"), (1, EOS, EOS)) == {EOS}


def test_reasoning_is_free_but_does_not_end_the_text() -> None:
    found, settings = grammars(), setting("regex", "b|c", after=END_THINK)
    assert ids(found, settings, ()) == set(range(VOCAB)) - {EOS}
    assert ids(found, settings, (1, 4)) == set(range(VOCAB)) - {EOS}
    assert ids(found, settings, (1, 4, END_THINK)) == {2, 3}
    assert ids(found, settings, (1, END_THINK, 2)) == {EOS}


def test_a_row_keeps_to_its_grammar_whatever_else_is_asked() -> None:
    row = torch.arange(5.0)
    allowed = torch.tensor([False, True, False, True, False])
    assert constrained(row, row, allowed).tolist() == [-torch.inf, 1, -torch.inf, 3, -torch.inf]
    banned = row.masked_fill(allowed, -torch.inf)
    assert constrained(banned, row, allowed).tolist() == [-torch.inf, 1, -torch.inf, 3, -torch.inf]
    logits = torch.zeros(1, VOCAB)
    wish = Adjust(banned=(2,), min_tokens=9, stop_ids=(EOS,), grammar=Grammar("regex", "b?"))
    (drawn,) = sample(logits, [Sampling(0.0, adjust=wish)], [3], [(0, ())], grammars())
    assert drawn.token in (2, EOS)
    (drawn,) = sample(logits, [Sampling(0.0, adjust=wish)], [3], [(0, (2,))], grammars())
    assert drawn.token == EOS


def test_rows_without_a_grammar_keep_their_tokens() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    plain = [Sampling(0.9, seed=s) for s in range(3)]
    with_one = [plain[0], setting("regex", "c+"), plain[2]]
    alone = sample(logits, plain, [1, 2, 3])
    beside = sample(logits, with_one, [1, 2, 3], [None, (0, ()), None], grammars())
    assert (beside[0], beside[2]) == (alone[0], alone[2])
    assert TEXTS[beside[1].token] in ("c", "cc")


def test_a_grammar_travels_between_stages() -> None:
    sampling = setting("regex", "a|b", after=7)
    part = Part(1, 4, (7, 8), (0,), (sampling, 6), history=(0, (9, 7, 8)))
    step = Step((MicroBatch((part,)),))
    assert Step.from_bytes(step.to_bytes()) == step


@pytest.mark.parametrize(
    ("kind", "text", "fact"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "a{5000}", "it may 1000 times"),
        ("json", '{"type": "nonsense"}', "nonsense"),
        ("json", '{"propertyNames": {}}', "propertyNames"),
        ("json", '{"$ref": "http://127.0.0.1:1/x"}', "does not fetch"),
        ("json", '{"minLength": 100000000}', "it may be 10000"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "root ::= (", "Expected"),
        ("grammar", "start: start", "cannot be used"),
    ],
)
def test_what_is_wrong_is_said(kind: str, text: str, fact: str) -> None:
    with pytest.raises(RequestError, match=fact):
        grammars().prepare(Grammar(kind, text)).result()  # type: ignore[arg-type]
