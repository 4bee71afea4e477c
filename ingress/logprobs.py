"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whalepod.ingress.assembler import Chosen
from whalepod.model.tokenizer import Tokenizer


class Told:
    """Writes the log-probabilities of one choice, as it grows.

    Args:
        tokenizer: None: tokens are told by id, as `token_id:7`.
        wanted: alternatives of each token; None: nothing is written.
    """

    def __init__(self, tokenizer: Tokenizer | None, wanted: int | None) -> None:
        self._tokenizer, self._wanted, self._length = tokenizer, wanted, 0

    def chat(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        """`logprobs` of chat: every token of the turn, those of the reasoning too."""
        if self._wanted is None:
            return None
        content = [
            {
                **self._entry(one.token, one.logprob),
                "top_logprobs": [self._entry(*other) for other in one.alternatives],
            }
            for one in chosen
        ]
        return {"content": content, "refusal": None}

    def completion(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        """`logprobs` of completions; offsets count characters of the tokens written so far."""
        if self._wanted is None:
            return None
        tokens, offsets = [self._text(one.token) for one in chosen], []
        for text in tokens:
            offsets.append(self._length)
            self._length += len(text)
        tops = [{self._text(i): p for i, p in reversed(one.alternatives)} for one in chosen]
        for one, text, top in zip(chosen, tokens, tops, strict=True):
            top.setdefault(text, one.logprob)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": tops if self._wanted else None,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        data = self._tokenizer.bytes_of(token) if self._tokenizer else None
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.decode([token])
