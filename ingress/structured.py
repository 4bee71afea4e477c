"""What a request says about the form of its text: `response_format` and `structured_outputs`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from whalepod.engine.held import grammar_of
from whalepod.engine.request import Grammar, Request
from whalepod.engine.trial import Trial
from whalepod.errors import RequestError
from whalepod.ingress.options import Options
from whalepod.model.chat import ReasoningSplitter
from whalepod.model.shape import ModelConfig
from whalepod.model.tokenizer import Tokenizer

MAX_CHOICES = 1024
MAX_BYTES = {"json": 1 << 16, "choice": 1 << 16, "regex": 1 << 14, "grammar": 1 << 14}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NamedSchema(_Body):
    """OpenAI's `json_schema`; the schema is kept to whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar | None:
        """What the text has to be. Raises RequestError."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError(
                    "response_format of type json_schema has no json_schema; add it",
                    "response_format",
                )
            schema = self.json_schema.schema_
            return any_object() if schema is None else schema_of(schema, "response_format")
        if self.json_schema is not None:
            raise RequestError(
                f"response_format has a json_schema but type {self.type}; use type json_schema",
                "response_format",
            )
        return any_object() if self.type == "json_object" else None


class StructuredOutputs(_Body):
    """vLLM's `structured_outputs`; exactly one field is set."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None

    def made(self) -> Grammar:
        """What the text has to be. Raises RequestError."""
        given = sorted(name.rstrip("_") for name in self.model_fields_set if getattr(self, name))
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; set exactly one of "
                "json, json_object, regex, choice, grammar",
                "structured_outputs",
            )
        if self.json_:
            return schema_of(self.json_, "structured_outputs")
        if self.choice:
            return choice_of(self.choice, "structured_outputs")
        if self.regex:
            return text_of("regex", self.regex, "structured_outputs")
        if self.grammar:
            return text_of("grammar", self.grammar, "structured_outputs")
        return any_object()


def wanted(fmt: ResponseFormat | None, outputs: StructuredOutputs | None) -> Grammar | None:
    """What the text of an HTTP request has to be, None for anything. Raises RequestError."""
    first = fmt.grammar() if fmt is not None else None
    if outputs is None:
        return first
    if first is not None:
        raise RequestError(
            "response_format and structured_outputs both say what the text has to be; "
            "leave one out",
            "structured_outputs",
        )
    return outputs.made()


def any_object() -> Grammar:
    """Some JSON object."""
    return Grammar("json", '{"type":"object"}')


def schema_of(schema: str | dict[str, Any], param: str) -> Grammar:
    """JSON that fits a schema. Raises RequestError."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is no JSON: {error}", param) from None
    try:
        # Two clients that order keys alike share what is compiled; order itself has a meaning.
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError("the JSON schema is nested too deeply", param) from None
    return text_of("json", text, param)


def choice_of(choices: Sequence[str], param: str) -> Grammar:
    """One of some texts. Raises RequestError."""
    if not 1 <= len(choices) <= MAX_CHOICES or "" in choices:
        raise RequestError(
            f"choice takes 1 to {MAX_CHOICES} texts, none of them empty (got {len(choices)})",
            param,
        )
    return text_of("choice", json.dumps(list(choices)), param)


def text_of(kind: Literal["json", "regex", "choice", "grammar"], text: str, param: str) -> Grammar:
    """A grammar of a bounded length. Raises RequestError."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"the {kind} holds a lone surrogate, which is no text", param) from None
    if size > MAX_BYTES[kind] or "\0" in text:
        raise RequestError(
            f"the {kind} has {size} bytes; it may have {MAX_BYTES[kind]}, and no zero bytes", param
        )
    return Grammar(kind, text)


def trial_of(tokenizer: Tokenizer | None, model: ModelConfig) -> Trial | None:
    """What tries grammars before the engine sees them; None without a tokenizer."""
    if tokenizer is None:
        return None
    return Trial(tokenizer.data, model.vocab_size, model.eos_token_id)


def after_reasoning(options: Options, splitter: ReasoningSplitter) -> Options:
    """Let a grammar hold for the answer alone where the model thinks first."""
    if options.grammar is None or not splitter.reasoning:
        return options
    return replace(options, grammar=replace(options.grammar, after=splitter.end))


async def check_grammar(trial: Trial | None, request: Request) -> None:
    """Wait until a request's grammar is known to be fine. Raises RequestError with the reason."""
    grammar = grammar_of(request)
    if grammar is None:
        return
    if trial is None:
        raise RequestError(
            "this checkpoint has no tokenizer, so structured output cannot be made",
            "structured_outputs",
        )
    # Others may wait for the same one, so leaving does not cancel it.
    await asyncio.shield(asyncio.wrap_future(trial.check(grammar)))
