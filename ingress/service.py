"""What the ingress does with a request, whatever protocol brought it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from whalepod.engine.client import EngineClient
from whalepod.engine.request import Request, Sampling
from whalepod.errors import RequestError
from whalepod.ingress.assembler import Assembler
from whalepod.ingress.generation import Choice, Generation, Runner, Usage, further
from whalepod.ingress.options import MAX_STOP_IDS, MAX_STOPS, Options, adjust_of, check_ids
from whalepod.ingress.structured import after_reasoning, trial_of
from whalepod.metrics import Metrics
from whalepod.model.chat import THINK, Message, ReasoningSplitter, render
from whalepod.model.shape import ModelConfig
from whalepod.model.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_LONG_TEXT = 16384


class UnknownModel(RequestError):
    """The request names another model than the one served."""


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
        self.trial = trial_of(tokenizer, model)

    async def ready(self) -> str | None:
        """None when requests are served now, else what is awaited. Raises nothing."""
        try:
            return await self.client.ready()
        except Exception as error:
            log.exception("the engine's state cannot be read")
            return f"the engine's state cannot be read ({type(error).__name__})"

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Around what reads, checks and starts a request: counts those that are refused."""
        try:
            yield
        except RequestError:
            self.metrics.rejected("invalid")
            raise

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` is the served model (or empty)."""
        if name and name != self.model_name:
            raise UnknownModel(
                f"model {name[:80]!r} is not served here; use {self.model_name!r}", "model"
            )

    async def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a completion prompt: BOS and the text, or the ids as they are."""
        if not isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; send at least one token id", "prompt")
            check_ids(prompt, "prompt", self.model.vocab_size)
            return list(prompt)
        if not prompt:
            raise RequestError("the prompt is empty; send at least one character", "prompt")
        tokenizer = self._need_tokenizer("prompt")
        _check_unicode(prompt, "prompt")
        ids = await _beside(len(prompt), lambda: tokenizer.encode_text(prompt))
        return [self.model.bos_token_id, *ids]

    async def encode_chat(self, messages: Sequence[Message], thinking: bool) -> list[int]:
        """Ids of a conversation."""
        tokenizer = self._need_tokenizer("messages")
        for message in messages:
            _check_unicode(message.content + message.reasoning, "messages")
        size = sum(len(m.content) + len(m.reasoning) for m in messages)
        return await _beside(size, lambda: render(messages, thinking, tokenizer))

    def complete(self, prompt_ids: list[int], options: Options) -> Generation:
        """Generate after a prompt."""
        return self._start(prompt_ids, options, lambda: None)

    def chat(self, prompt_ids: list[int], options: Options) -> Generation:
        """Generate an assistant turn, split into reasoning and content."""
        tokenizer = self._need_tokenizer("messages")
        # A prompt may end behind the reasoning: in chat mode, or where a prefix is continued.
        is_open = prompt_ids[-1] == tokenizer.control_id(THINK)
        options = after_reasoning(options, ReasoningSplitter(tokenizer, is_open))
        return self._start(prompt_ids, options, lambda: ReasoningSplitter(tokenizer, is_open))

    def _start(
        self,
        prompt_ids: list[int],
        options: Options,
        splitter: Callable[[], ReasoningSplitter | None],
    ) -> Generation:
        first = self._request(prompt_ids, options)
        choices = []
        for index in range(options.n):
            request = further(first, index) if index else first
            decoder = self.tokenizer.detokenizer() if self.tokenizer else None
            assembler = Assembler(decoder, options.stop, splitter(), index)
            choices.append(Choice(index, request, assembler))
        told = options.logprobs, options.prompt_logprobs
        generation = Generation(first.id, Usage(len(prompt_ids)), prompt_ids, *told)
        runner = Runner(self.client, self.metrics, self.trial, generation)
        generation.deltas = runner.deltas(choices)
        return generation

    def _request(self, prompt_ids: list[int], options: Options) -> Request:
        self._check_stops(options)
        vocabulary, told = self.model.vocab_size, options.prompt_logprobs
        seed = options.seed if options.seed is not None else secrets.randbits(63)
        return Request(
            id=secrets.token_hex(12),
            prompt_ids=tuple(prompt_ids),
            max_tokens=self._budget(len(prompt_ids), options.max_tokens),
            sampling=Sampling(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k if 0 < options.top_k < vocabulary else 0,
                seed=seed % (1 << 63),
                min_p=options.min_p,
                adjust=adjust_of(options, self.model),
                alternatives=min(options.logprobs or 0, vocabulary),
            ),
            stop_ids=(self.model.eos_token_id, *options.stop_token_ids),
            ignore_eos=options.ignore_eos,
            cache_salt=options.cache_salt,
            priority=options.priority,
            timeout_s=options.timeout_s,
            prompt_logprobs=told if told is None else min(told, vocabulary),
            copies=options.n,
        )

    def _budget(self, prompt_tokens: int, wanted: int | None) -> int:
        room = self.max_context - prompt_tokens
        if room < (wanted != 0):
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and the context holds "
                f"{self.max_context}, output included; shorten the prompt",
                "prompt",
            )
        if wanted is not None and wanted > room:
            raise RequestError(
                f"{prompt_tokens} prompt tokens + max_tokens {str(wanted)[:20]} exceed the context of "
                f"{self.max_context}; ask for at most {room} tokens",
                "max_tokens",
            )
        return room if wanted is None else wanted

    def _check_stops(self, options: Options) -> None:
        if len(options.stop) > MAX_STOPS or "" in options.stop:
            raise RequestError(
                f"stop takes at most {MAX_STOPS} strings, none of them empty", "stop"
            )
        if len(options.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(f"stop_token_ids takes at most {MAX_STOP_IDS} ids", "stop_token_ids")
        check_ids(options.stop_token_ids, "stop_token_ids", self.model.vocab_size)
        if options.stop and self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer, so stop strings cannot be found; "
                "use stop_token_ids",
                "stop",
            )

    def _need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer; send the prompt as token ids to the "
                "completion endpoint",
                param,
            )
        return self.tokenizer


async def _beside(size: int, encode: Callable[[], list[int]]) -> list[int]:
    """Encode a long text (`size` characters) on a thread, so that streams go on meanwhile."""
    return await asyncio.to_thread(encode) if size > _LONG_TEXT else encode()


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds a lone surrogate at character {error.start}, which is no Unicode text",
            param,
        ) from None
