"""A small tokenizer of V4's kind: byte-level BPE, V4's pre-tokenizer and protocol tokens."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Source: `tokenizer.json` of DeepSeek-V4: digit groups, CJK and kana runs, then words,
# punctuation and space.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# The text-protocol tokens in V4's order; they sit at the end of the vocabulary.
PROTOCOL = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
_SAMPLE = (
    "The whale swam past the harbour at night, and nobody on the pier saw it go. ",
    "A pod of whales stays together: when one of them is lost, the others call for it. ",
    "Once upon a time there was a small boat that wanted to see the open sea. ",
    "What is the answer? The answer is 42, and the question is why it was asked. ",
    "Experts are chosen for every token; attention keeps what has been said before. ",
)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """V4's pre-tokenizer."""
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    return pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer with exactly `vocab_size` ids: BOS, EOS, pad first, protocol tokens last.

    Ids that the texts do not suffice for become reserved tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(PROTOCOL),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    spare = vocab_size - len(PROTOCOL) - tokenizer.get_vocab_size()
    names = [f"<｜reserved▁{i}｜>" for i in range(spare)] + list(PROTOCOL)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    return tokenizer


def small_tokenizer(vocab_size: int) -> str:
    """`tokenizer.json` of a tokenizer trained on a few built-in sentences."""
    return str(train([" ".join(_SAMPLE)], vocab_size).to_str())


def tokenizer_config(max_length: int) -> str:
    """`tokenizer_config.json` to go with it: the prompt carries BOS itself, pad is EOS."""
    return json.dumps(
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        ensure_ascii=False,
        indent=1,
    )
