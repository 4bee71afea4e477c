"""What the ingress does with a request, whatever protocol brought it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from whalepod.engine.client import EngineClient
from whalepod.engine.request import Request, Sampling
from whalepod.errors import NotReady, Overloaded, RequestError
from whalepod.ingress.stops import StopStrings
from whalepod.metrics import Metrics, Stopwatch
from whalepod.model.chat import Message, ReasoningSplitter, render
from whalepod.model.shape import ModelConfig
from whalepod.model.tokenizer import Tokenizer


class UnknownModel(RequestError):
    """The request names another model than the one served."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate, with every default already filled in but `max_tokens`."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """New text (and the tokens behind it), or the end of it.

    `finish` is set on the last delta: `stop`, `length` or `error`.
    """

    content: str = ""
    reasoning: str = ""
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Generation:
    """A request under way: iterate `deltas`; `usage` counts along."""

    id: str
    usage: Usage
    deltas: AsyncGenerator[Delta, None] = field(init=False)


class Service:
    """Validates, renders, tokenises, generates, detokenises.

    Args:
        client: makes tokens.
        tokenizer: None when the checkpoint has none; then prompts must be token ids.
        model_name: the id clients send.
        max_context: longest prompt plus output.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        model_name: str,
        model: ModelConfig,
        max_context: int,
        metrics: Metrics,
    ) -> None:
        self.client, self.tokenizer, self.model_name = client, tokenizer, model_name
        self.model, self.max_context, self.metrics = model, max_context, metrics

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` is the served model (or empty)."""
        if name and name != self.model_name:
            raise UnknownModel(
                f"model {name!r} is not served here; use {self.model_name!r}", "model"
            )

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a completion prompt: BOS and the text, or the ids as they are."""
        if not isinstance(prompt, str):
            return self._check_ids(list(prompt))
        if not prompt:
            raise RequestError("prompt is empty; send at least one character", "prompt")
        tokenizer = self._need_tokenizer("prompt")
        return [self.model.bos_token_id, *self._encode(tokenizer, prompt, "prompt")]

    def encode_chat(self, messages: Sequence[Message], thinking: bool) -> list[int]:
        """Ids of a conversation."""
        tokenizer = self._need_tokenizer("messages")
        for message in messages:
            _check_unicode(message.content + message.reasoning, "messages")
        return render(messages, thinking, tokenizer)

    def complete(self, prompt_ids: list[int], options: Options) -> Generation:
        """Generate after a prompt."""
        return self._start(prompt_ids, options, None)

    def chat(self, prompt_ids: list[int], options: Options, thinking: bool) -> Generation:
        """Generate an assistant turn, split into reasoning and content."""
        tokenizer = self._need_tokenizer("messages")
        return self._start(prompt_ids, options, ReasoningSplitter(tokenizer, thinking))

    def _start(
        self, prompt_ids: list[int], options: Options, splitter: ReasoningSplitter | None
    ) -> Generation:
        try:
            request = self._request(prompt_ids, options)
        except RequestError:
            self.metrics.rejected("invalid")
            raise
        generation = Generation(request.id, Usage(len(prompt_ids)))
        generation.deltas = self._deltas(generation, request, options, splitter)
        return generation

    def _request(self, prompt_ids: list[int], options: Options) -> Request:
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds "
                f"{self.max_context}, output included; shorten the prompt",
                "prompt",
            )
        wanted = options.max_tokens if options.max_tokens is not None else room
        if wanted > room:
            raise RequestError(
                f"{len(prompt_ids)} prompt tokens + max_tokens {wanted} exceed the context of "
                f"{self.max_context}; ask for at most {room} tokens",
                "max_tokens",
            )
        if options.stop and self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer, so stop strings cannot be found; "
                "use stop_token_ids",
                "stop",
            )
        seed = options.seed if options.seed is not None else secrets.randbits(63)
        return Request(
            id=secrets.token_hex(12),
            prompt_ids=tuple(prompt_ids),
            max_tokens=wanted,
            sampling=Sampling(
                options.temperature, options.top_p, max(options.top_k, 0), seed % (1 << 63)
            ),
            stop_ids=(self.model.eos_token_id, *options.stop_token_ids),
            ignore_eos=options.ignore_eos,
        )

    async def _deltas(
        self,
        generation: Generation,
        request: Request,
        options: Options,
        splitter: ReasoningSplitter | None,
    ) -> AsyncGenerator[Delta, None]:
        watch, metrics = Stopwatch(self.metrics), self.metrics
        metrics.running.inc()
        metrics.prompt_tokens.inc(generation.usage.prompt_tokens)
        reason = "abort"
        try:
            assembler = Assembler(self.tokenizer, options.stop, splitter, request.stop_ids)
            async with aclosing(self.client.generate(request)) as events:
                async for event in events:
                    if event.token >= 0:
                        watch.token()
                        generation.usage.completion_tokens += 1
                    if event.finish in ("error", "abort"):
                        reason = event.finish
                        yield Delta(finish="error", error=event.error or "the request was ended")
                        return
                    ends = event.finish == "stop" and not request.ignore_eos
                    delta, stopped = assembler.push(event.token, event.finish, ends)
                    if stopped or event.finish is not None:
                        reason = delta.finish or "stop"
                        yield delta
                        return
                    if delta.content or delta.reasoning or not self.tokenizer:
                        yield delta
        except Overloaded:
            metrics.rejected("overloaded")
            raise
        except NotReady:
            metrics.rejected("not_ready")
            raise
        except RequestError:
            metrics.rejected("invalid")
            raise
        finally:
            metrics.running.dec()
            watch.end(reason)

    def _need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer; send the prompt as token ids to /v1/completions",
                param,
            )
        return self.tokenizer

    def _encode(self, tokenizer: Tokenizer, text: str, param: str) -> list[int]:
        _check_unicode(text, param)
        return tokenizer.encode_text(text)

    def _check_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise RequestError("prompt is empty; send at least one token id", "prompt")
        wrong = next((i for i in ids if not 0 <= i < self.model.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is outside the vocabulary, 0 to {self.model.vocab_size - 1}",
                "prompt",
            )
        return ids


class Assembler:
    """Turns tokens into text deltas: whole characters, stop strings held back, markers dropped."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...],
        splitter: ReasoningSplitter | None,
        stop_ids: tuple[int, ...],
    ) -> None:
        self._decoder = tokenizer.detokenizer() if tokenizer else None
        self._stops, self._splitter, self._stop_ids = StopStrings(stop), splitter, stop_ids
        self._channel = "reasoning" if splitter and splitter.reasoning else "content"
        self._tokens: list[int] = []

    def push(self, token: int, finish: str | None, ends: bool) -> tuple[Delta, bool]:
        """Take a token; returns the delta, and whether a stop string ended the text.

        Args:
            finish: the engine's verdict with this token.
            ends: the token itself is a stop id, which is not text.
        """
        channel = self._channel
        text = ""
        if token >= 0:
            self._tokens.append(token)
        if self._decoder is not None and token >= 0 and not ends:
            text = self._text(token)
        if finish is not None and self._decoder is not None:
            text += self._decoder.flush()
        text, hit = self._stops.push(text)
        if finish is not None and not hit:
            text += self._stops.flush()
        verdict = "stop" if hit else finish
        # Tokens whose text is held back travel with the text that follows.
        tokens: tuple[int, ...] = ()
        if text or verdict is not None or self._decoder is None:
            tokens = tuple(self._tokens)
            self._tokens.clear()
        if channel == "reasoning":
            return Delta(reasoning=text, tokens=tokens, finish=verdict), hit
        return Delta(content=text, tokens=tokens, finish=verdict), hit

    def _text(self, token: int) -> str:
        assert self._decoder is not None
        kind = self._splitter.push(token) if self._splitter is not None else "content"
        if kind != "mark":
            return self._decoder.push(token)
        rest = self._decoder.flush() + self._stops.flush()
        self._channel = "reasoning" if self._splitter and self._splitter.reasoning else "content"
        return rest


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds a lone surrogate at character {error.start}, which is no Unicode text",
            param,
        ) from None
