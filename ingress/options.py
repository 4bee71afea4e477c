"""How to generate: the settings of a request, whatever protocol brought them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whalepod.engine.request import Adjust, Grammar
from whalepod.errors import RequestError
from whalepod.model.shape import ModelConfig

MAX_STOPS = 16
MAX_STOP_IDS = 128
# OpenAI's limit of logit_bias; of allowed and banned ids too.
MAX_BIASES = 1024
# Most alternatives that are told with a token.
MAX_LOGPROBS = 20
# Most choices of one request.
MAX_CHOICES = 128
# Priorities are 32-bit integers in every protocol.
PRIORITIES = (-(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate, with every default already filled in but `max_tokens`.

    `logprobs` is how many alternatives are told with each token and its log-probability; None: not even
    that. `prompt_logprobs` is the same for tokens of the prompt. So many choices, `n`, are made.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    priority: int = 0
    timeout_s: float | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1


def adjust_of(options: Options, model: ModelConfig) -> Adjust | None:
    """What changes the logits, None for nothing. Raises RequestError."""
    biased = tuple(token for token, _ in options.logit_bias)
    check_ids(biased, "logit_bias", model.vocab_size)
    check_ids(options.allowed_token_ids, "allowed_token_ids", model.vocab_size)
    check_ids(options.banned_token_ids, "banned_token_ids", model.vocab_size)
    stops = (model.eos_token_id, *options.stop_token_ids)
    never = {*options.banned_token_ids, *(stops if options.min_tokens else ())}
    kept = set(options.allowed_token_ids) - never
    if not kept and (options.allowed_token_ids or len(never) >= model.vocab_size):
        raise RequestError(
            "allowed_token_ids, banned_token_ids and min_tokens leave no token to choose; "
            "allow one more",
            "allowed_token_ids",
        )
    if options.max_tokens is not None and options.min_tokens > options.max_tokens:
        raise RequestError(
            f"min_tokens {options.min_tokens} exceeds max_tokens {options.max_tokens}; lower it",
            "min_tokens",
        )
    if options.grammar is not None and options.ignore_eos:
        raise RequestError(
            "ignore_eos asks for text behind the end of what structured output asks for; "
            "leave one out",
            "ignore_eos",
        )
    wanted = Adjust(
        options.presence_penalty,
        options.frequency_penalty,
        options.repetition_penalty,
        options.logit_bias,
        options.allowed_token_ids,
        options.banned_token_ids,
        options.min_tokens,
        stops,
        options.grammar,
    )
    return None if wanted == Adjust(stop_ids=stops) else wanted


def check_ids(ids: Sequence[int], param: str, vocabulary: int) -> None:
    """Raise RequestError for the first id that the model does not have."""
    wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise RequestError(
            f"token id {str(wrong)[:20]} is outside the vocabulary, 0 to {vocabulary - 1}", param
        )
