"""Train the tokenizer and encode the texts with it.

    python -m demo.tokens --folder .cache/demo --vocab 4096

V4's kind: byte-level BPE, V4's pre-tokenizer and protocol tokens. Digits are never merged: sums
and numbers are learnt digit by digit. Writes `tokenizer.json`, `texts.train.bin` and
`texts.held_out.bin` (uint16, every document between BOS and EOS).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from demo.documents import document, lesson
from whalepod.model.tiny_tokenizer import PROTOCOL, train

BOS, EOS = 0, 1


def sample(seed: int, count: int) -> list[str]:
    """Generated documents for the vocabulary, their markers cut out."""
    rng = Random(seed)
    marks = re.compile(
        "|".join(map(re.escape, [*PROTOCOL, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]))
    )
    found = [document(rng) for _ in range(count)] + [lesson(rng, 3000) for _ in range(count // 20)]
    return [marks.sub("\n", text) for text in found]


def encode(tokenizer: Tokenizer, docs: list[str]) -> np.ndarray:
    """Texts (never markers) to one row of ids."""
    ids: list[int] = []
    for found in tokenizer.encode_batch_fast(docs, add_special_tokens=False):
        ids += [BOS, *found.ids, EOS]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    texts = {
        split: (args.folder / f"texts.{split}").read_text(encoding="utf-8").split("\0")
        for split in ("train", "held_out")
    }
    words = [re.sub(r"[0-9]+", " ", text) for text in texts["train"][::3] + sample(0, 5000)]
    tokenizer = train(words, args.vocab)
    tokenizer.save(str(args.folder / "tokenizer.json"))
    print(f"vocabulary {tokenizer.get_vocab_size()}")
    for split, docs in texts.items():
        ids = encode(tokenizer, docs)
        ids.tofile(args.folder / f"texts.{split}.bin")
        size = sum(len(doc.encode()) for doc in docs)
        print(f"{split}: {len(ids)} tokens, {size / len(ids):.2f} bytes/token")


if __name__ == "__main__":
    main()
