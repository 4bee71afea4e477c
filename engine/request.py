"""What a user asked, and the only thing that flows back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from whalepod.engine.prefix import Node
from whalepod.engine.prompt import PromptLogprobs

FinishReason = Literal["stop", "length", "abort", "error", "deadline"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text has to be; see `engine/grammar.py`.

    Args:
        kind: `text` is a JSON schema, a regex, a JSON list of choices, or a grammar (Lark, GBNF).
        after: it holds behind the first such token (the end of reasoning); -1: from the start.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str
    after: int = -1


@dataclass(frozen=True, slots=True)
class Adjust:
    """What changes the logits before the choice; see `engine/adjust.py`.

    Args:
        presence, frequency: subtracted once, and for every time a token was generated.
        repetition: divides (positive) or multiplies (negative) the logits of known tokens.
        bias: (id, value) pairs that are added.
        allowed: ids that may come, empty for all. banned: ids that may not.
        min_tokens: `stop_ids` may not come before so many tokens.
        grammar: only what it takes may come.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token; a pure function of (logits, seed, position) with these settings.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1.0 and `min_p` 0.0 are off. With `adjust` the
    choice depends on the request's own tokens too. So many `alternatives` are told with each token:
    the most probable ones before any of these settings.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    adjust: Adjust | None = None
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make: already validated and tokenised, immutable.

    Args:
        id: unique among the live requests.
        prompt_ids: token ids of the prompt, at least one.
        max_tokens: at most this many new tokens; 0: the prompt is computed, and nothing drawn.
        sampling: how to choose tokens.
        stop_ids: token ids that end the text; they are emitted with finish `stop`.
        ignore_eos: go on after a stop id (benchmarks).
        emitted: tokens a former member has already emitted for this request. They are
            prefilled with the prompt and not emitted again; `max_tokens` counts them.
        cache_salt: computed prefixes are shared among requests of the same salt only.
        priority: the lowest number goes first; order of arrival decides among equals.
        timeout_s: seconds from submission after which the request ends, done or not.
        replayed: it was admitted before (a former member had taken it in, or it is another's copy),
            so the limits of a queue do not apply.
        prompt_logprobs: alternatives to tell with the log-probability of every prompt token but the
            first; None: nothing is told of the prompt.
        copies: so many requests with this prompt are admitted with this one, itself among them; the
            others come, with `replayed`, once the prompt is computed.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    emitted: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    replayed: bool = False
    prompt_logprobs: int | None = None
    copies: int = 1


@dataclass(slots=True)  # frozen ones take several times as long to make, and there is one a token
class TokenEvent:
    """One new token of one request, or its end.

    `index` counts generated tokens from 0 (replayed ones included), so a consumer can
    drop what it has already seen. `finish` is set on the last event of a request.
    `token` is -1 on an event that only ends the request (`abort`, `error`, `deadline`, and `length`
    where no token was asked for). `cached` is
    how many prompt tokens were not computed because an earlier request had left them. `alternatives`
    are the most probable tokens with their log-probabilities, where the request asks for them.
    `prompt` comes with the first event of a request that asks for it, and with no other.

    To be added up over a request's events: `drafted` guesses were verified for this token and those
    that came with it, `accepted` is 1 where the token had been guessed, `preempted` times it gave
    its room back before, and `queued_s` is how long it had waited to be computed at first.
    """

    request_id: str
    index: int
    token: int
    logprob: float = 0.0
    finish: FinishReason | None = None
    error: str | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    queued_s: float = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()
    prompt: PromptLogprobs | None = None


@dataclass(slots=True)
class Tally:
    """What the next event of a sequence says beside its token; see `TokenEvent`."""

    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    queued_s: float = 0.0


class Sequence:
    """A request on the attention member: its tokens so far, and how far its state has come.

    `computed` tokens are in the cache; the sequence decodes when one token is not. Tokens beyond
    the prompt are those generated here or replayed from a former member.

    Args:
        request: what to do.
        now: when it was submitted, by `time.monotonic`.
    """

    __slots__ = (
        "arrived",
        "begun",
        "blocks",
        "branch",
        "cached",
        "computed",
        "deadline",
        "displaced",
        "drafts",
        "finished",
        "kept",
        "nodes",
        "prompt",
        "request",
        "restore",
        "served",
        "slot",
        "submitted",
        "table",
        "tally",
        "tokens",
        "told",
    )

    def __init__(self, request: Request, now: float = 0.0) -> None:
        self.request = request
        self.tokens = [*request.prompt_ids, *request.emitted]
        self.computed = 0
        self.drafts: list[int] = []
        # The cached blocks it holds, the snapshot its slot starts from, where other sequences
        # went on differently, and snapshots taken: (tokens, slot).
        self.nodes: list[Node] = []
        self.restore, self.branch, self.cached = -1, 0, 0
        self.kept: list[tuple[int, int]] = []
        self.slot = -1
        self.blocks: list[int] = []
        self.table: tuple[
            int, ...
        ] = ()  # as the last part had them: the same object while they are
        # Its place in the order of arrival, the step that last computed some of it, and how often
        # a request of better priority has taken its room.
        self.arrived = self.served = self.displaced = 0
        self.submitted, self.begun = now, False
        self.deadline = None if request.timeout_s is None else now + request.timeout_s
        self.tally = Tally()
        self.finished: FinishReason | None = None
        # Of how many prompt tokens all is known that is asked (of the first there is nothing to
        # tell), and what is to be told of them with the next event.
        asks = request.prompt_logprobs is not None
        self.told = 1 if asks else len(request.prompt_ids)
        self.prompt: list[PromptLogprobs] | None = [] if asks else None

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def skippable(self) -> int:
        """Tokens at its beginning that need not be computed where they are in the cache."""
        is_told = self.told >= len(self.request.prompt_ids)
        return len(self.tokens) if is_told else self.told - 1

    def tell(self, end: int) -> tuple[int, tuple[int, ...], int] | None:
        """What a part that ends before the token `end` has to tell; see `Part.tell`."""
        stop = min(end + 1, len(self.request.prompt_ids))
        count = self.request.prompt_logprobs
        if count is None or self.told >= stop:
            return None
        return self.told - 1 - self.computed, tuple(self.tokens[self.told : stop]), count

    def learn(self, told: PromptLogprobs) -> None:
        """Take in what is told of the next tokens of the prompt."""
        assert self.prompt is not None
        self.prompt.append(told)
        self.told += len(told)

    def history(self) -> tuple[int, tuple[int, ...]] | None:
        """Number of prompt tokens and all tokens, for settings that depend on them.

        The prompt is left out (0) where the settings do not look at it.
        """
        adjust, prompt = self.request.sampling.adjust, len(self.request.prompt_ids)
        if adjust is None:
            return None
        if adjust.repetition == 1:  # nothing else looks at the prompt
            return 0, tuple(self.tokens[prompt:])
        return prompt, tuple(self.tokens)

    def accept(
        self, token: int, logprob: float, alternatives: tuple[tuple[int, float], ...] = ()
    ) -> TokenEvent:
        """Append a sampled token and say so; the event carries the finish if this ends it."""
        request = self.request
        index = self.generated
        self.tokens.append(token)
        if token in request.stop_ids and not request.ignore_eos:
            self.finished = "stop"
        elif index + 1 >= request.max_tokens:
            self.finished = "length"
        return self._event(index, token, logprob, alternatives)

    def end(self) -> TokenEvent:
        """The prompt is computed and no token is asked for."""
        self.finished = "length"
        return self._event(self.generated, -1, 0.0, ())

    def _event(
        self, index: int, token: int, logprob: float, alternatives: tuple[tuple[int, float], ...]
    ) -> TokenEvent:
        tally, self.tally = self.tally, Tally()
        told = None
        if self.prompt is not None:
            told = PromptLogprobs.join(self.prompt, self.request.prompt_logprobs or 0)
            self.prompt = None
        return TokenEvent(
            self.request.id, index, token, logprob, self.finished, None, self.cached,
            tally.drafted, tally.accepted, tally.preempted, tally.queued_s, alternatives, told,
        )  # fmt: skip
