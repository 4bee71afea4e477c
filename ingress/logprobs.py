"""Log-probabilities in OpenAI's two shapes, and those of prompts in vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from whalepod.engine.prompt import PromptLogprobs
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
        self._texts: dict[int, str] = {}

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

    def completion(self, chosen: Sequence[Chosen], unseen: int = 0) -> dict[str, Any] | None:
        """`logprobs` of completions; offsets count characters of the tokens written so far.

        Args:
            unseen: so many tokens at the beginning are no part of the text.
        """
        if self._wanted is None:
            return None
        tokens, offsets = [self._text(one.token) for one in chosen], []
        for i, text in enumerate(tokens):
            offsets.append(self._length)
            self._length += len(text) if i >= unseen else 0
        tops = [self._top(one) for one in chosen]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": tops if self._wanted else None,
            "text_offset": offsets,
        }

    def echoed(self, ids: Sequence[int], told: PromptLogprobs | None) -> list[Chosen]:
        """A prompt's tokens with what is told of them, as if they had been generated."""
        if self._wanted is None or told is None:
            return [Chosen(token, None) for token in ids]
        told = told.cut(0, len(told), self._wanted)
        rows = zip(ids[1:], told.logprobs_R.tolist(), _pairs(told), strict=True)
        return [Chosen(ids[0], None), *(Chosen(token, p, tuple(tops)) for token, p, tops in rows)]

    def prompt(
        self, ids: Sequence[int], told: PromptLogprobs, count: int
    ) -> list[dict[str, Any] | None]:
        """VLLM's `prompt_logprobs`: by id of token, the prompt's own first; null for the first one."""
        told = told.cut(0, len(told), count)
        found: list[dict[str, Any] | None] = [None]
        own = zip(ids[1:], told.logprobs_R.tolist(), told.ranks_R.tolist(), strict=True)
        for (token, logprob, rank), others in zip(own, _pairs(told), strict=True):
            entry = {str(token): self._ranked(token, logprob, rank)}
            for place, (other, p) in enumerate(others, 1):
                entry.setdefault(str(other), self._ranked(other, p, place))
            found.append(entry)
        return found

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = None if self._tokenizer is None else self._text(token)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    def _top(self, one: Chosen) -> dict[str, float] | None:
        if one.logprob is None:
            return None
        top = {self._text(i): p for i, p in reversed(one.alternatives)}
        top.setdefault(self._text(one.token), one.logprob)
        return top

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        data = self._tokenizer.bytes_of(token) if self._tokenizer else None
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._tokenizer.decode([token])
        return text


def _pairs(told: PromptLogprobs) -> Iterator[Iterator[tuple[int, float]]]:
    """Alternatives of every token."""
    for ids, values in zip(told.ids_RK.tolist(), told.values_RK.tolist(), strict=True):
        yield zip(ids, values, strict=True)
