"""Rows of tokens for training: literature, short documents and recall lessons side by side.

Every batch mixes all kinds, row by row: with batches of one kind the router's bias would chase its
own tail. Batch number n is a function of the seed and n alone, whatever the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo.documents import document, lesson
from demo.documents.protocol import ASSISTANT, USER
from demo.documents.recall import Filler
from demo.documents.stories import story

# Weight of a prediction inside a system block or a user's turn; answers and free text weigh 1.
SYSTEM_WEIGHT, USER_WEIGHT = 0.05, 0.2
_CHARS_PER_TOKEN = 3.7


@dataclass(frozen=True)
class Recipe:
    """Rows per batch, tokens per row, and the share of each kind of row."""

    rows: int
    length: int
    text: float = 0.25
    short: float = 0.40
    recall: float = 0.35


class Source:
    """Makes rows. Reads `tokenizer.json`, `texts.{split}` and `texts.{split}.bin` of a folder."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.user, self.assistant = (self.tokenizer.token_to_id(t) for t in (USER, ASSISTANT))
        self.text = np.fromfile(folder / f"texts.{split}.bin", dtype=np.uint16)
        self.books = (folder / f"texts.{split}").read_text(encoding="utf-8").split("\0")

    def filler(self, rng: Random) -> Filler:
        """Text between facts: stories or literature, one kind a document or both."""
        share = rng.choice((0.0, 0.5, 1.0))

        def fill(chars: int) -> str:
            parts: list[str] = []
            while (left := chars - sum(map(len, parts))) > 0:
                parts.append(self._book(rng, left) if rng.random() < share else story(rng).text)
            return " ".join(parts)

        return fill

    def _book(self, rng: Random, chars: int) -> str:
        book = rng.choice(self.books)
        sentences = re.split(r"(?<=[.!?;])\s+", book)
        first, taken = rng.randrange(len(sentences)), 0
        picked = []
        for sentence in sentences[first:]:
            picked.append(sentence)
            taken += len(sentence)
            if taken >= min(chars, 700):
                break
        return " ".join(picked)

    def ids(self, text: str) -> np.ndarray:
        """Token ids of a document with markers."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def weights(self, ids: np.ndarray) -> np.ndarray:
        """How much the prediction of each token counts."""
        weight = np.ones(len(ids), dtype=np.float32)
        users = np.flatnonzero(ids == self.user)
        if len(users):
            weight[1 : users[0] + 1] = SYSTEM_WEIGHT
        answers = np.flatnonzero(ids == self.assistant)
        for start in users:
            later = answers[answers > start]
            stop = later[0] + 2 if len(later) else len(ids)  # the choice to think is the user's
            weight[start:stop] = USER_WEIGHT
        return weight

    def row(self, rng: Random, kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of one row of `length + 1` tokens."""
        size = length + 1
        if kind == "text":
            start = rng.randrange(len(self.text) - size)
            return self.text[start : start + size].astype(np.int64), np.ones(size, np.float32)
        parts: list[np.ndarray] = []
        room = size
        while room > 0:
            ids = self._lesson(rng, room) if kind == "recall" and room > 150 else None
            ids = self.ids(document(rng)) if ids is None else ids
            parts.append(ids)
            room -= len(ids)
        weights = np.concatenate([self.weights(part) for part in parts])[:size]
        return np.concatenate(parts)[:size], weights

    def _lesson(self, rng: Random, room: int) -> np.ndarray | None:
        """A lesson that fits, so that its questions are not cut off."""
        chars = int(400 * (room * _CHARS_PER_TOKEN / 400) ** rng.random() ** 0.5)
        for _ in range(3):
            ids = self.ids(lesson(rng, chars, self.filler(rng)))
            if len(ids) <= room:
                return ids
            chars = int(chars * 0.85 * room / len(ids))
        return None

    def batch(self, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens `[rows, length + 1]` int64 and weights `[rows, length]` of predicting 1 onwards."""
        rng = Random(seed)
        kinds = ["text", "short", "recall"]
        # Exact shares, so that every batch looks alike to the router.
        marks = np.cumsum([recipe.text, recipe.short, recipe.recall])
        marks = marks / marks[-1]
        rows = [
            self.row(
                rng, kinds[int(np.searchsorted(marks, (i + 0.5) / recipe.rows))], recipe.length
            )
            for i in range(recipe.rows)
        ]
        ids = torch.from_numpy(np.stack([ids for ids, _ in rows]))
        return ids, torch.from_numpy(np.stack([weight[1:] for _, weight in rows]))


class _Stream(IterableDataset):
    def __init__(self, folder: Path, recipe: Recipe, seed: int, first: int) -> None:
        self.folder, self.recipe, self.seed, self.first = folder, recipe, seed, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        step, number = (info.num_workers, info.id) if info else (1, 0)
        torch.set_num_threads(1)
        source, number = Source(self.folder), number + self.first
        while True:
            yield source.batch(self.recipe, self.seed * 1_000_003 + number)
            number += step


def stream(
    folder: Path, recipe: Recipe, seed: int, first: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `first`, `first + 1`, ... made in background processes."""
    loader = DataLoader(
        _Stream(folder, recipe, seed, first),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=bool(workers),
    )
    return iter(loader)
