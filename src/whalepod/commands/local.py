"""Commands that need no cluster: generate, inspect, make-tiny."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from whalepod.commands.cluster import read_config
from whalepod.engine.local import open_engine
from whalepod.engine.request import Request, Sampling
from whalepod.engine.source import Source
from whalepod.errors import ConfigError, RequestError
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.inspection import inspect_checkpoint, inspect_config
from whalepod.model.tiny import PRESETS, make_tiny
from whalepod.model.tokenizer import Tokenizer

Parsers = Any
_FIELDS = {"prompt", "prompt_ids", "max_tokens", "temperature", "seed", "ignore_eos"}


def add_generate(commands: Parsers) -> None:
    """`whalepod generate`."""
    parser = commands.add_parser("generate", help="generate text in one process, without Ray")
    parser.add_argument("config", nargs="?", help="configuration file (YAML)")
    parser.add_argument("--model", help="checkpoint folder; overrides model.path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text")
    source.add_argument("--prompt-ids", help="token ids, as 1,2,3")
    source.add_argument("--prompts", help="JSONL file, one request a line")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["fp32", "bf16"])
    parser.add_argument("--fidelity", choices=["plain", "released"])
    parser.add_argument("--layout", choices=["single", "ep", "afd"], default=None)
    for name in ("attention", "experts", "routers", "stages", "micro-batches"):
        parser.add_argument(f"--{name}", type=int, help=f"topology.{name.replace('-', '_')}")
    parser.add_argument("--router", choices=["own", "attention"])
    parser.add_argument("--max-batch", type=int, help="requests that run at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per member")
    parser.add_argument("--json", action="store_true", help="print one object a request")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> None:
    """Run prompts through a layout of this process and print the results in order."""
    config = read_config(options.config, options.model, _overrides(options))
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.open(config.model.path)
    checkpoint = Checkpoint.open(config.model.path)
    requests = list(_requests(options, tokenizer, checkpoint))
    with torch.inference_mode():
        engine = open_engine(config, Source(config.model, checkpoint))
        ids: dict[str, list[int]] = {r.id: [] for r in requests}
        finish: dict[str, str | None] = {}
        try:
            for event in engine.run(requests):
                if event.token >= 0:
                    ids[event.request_id].append(event.token)
                finish[event.request_id] = event.finish
        finally:
            engine.close()
    for request in requests:
        found = ids[request.id]
        text = _text(found, request, finish[request.id], tokenizer)
        if not options.json:
            print(text if tokenizer else ",".join(map(str, found)))
            continue
        result = {
            "prompt_ids": list(request.prompt_ids),
            "ids": found,
            "text": text,
            "finish_reason": finish[request.id],
        }
        print(json.dumps(result, ensure_ascii=False))


def _overrides(options: argparse.Namespace) -> list[str]:
    layout = options.layout
    if layout is None and options.config is None:
        layout = "single"
    keys = {
        "model.dtype": options.dtype,
        "model.fidelity": options.fidelity,
        "topology.layout": layout,
        "topology.router": options.router,
        "engine.max_batch": options.max_batch,
        **{
            f"topology.{name}": getattr(options, name)
            for name in ("attention", "experts", "routers", "stages", "micro_batches")
        },
    }
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def _text(
    ids: list[int], request: Request, finish: str | None, tokenizer: Tokenizer | None
) -> str | None:
    if tokenizer is None:
        return None
    ended = finish == "stop" and not request.ignore_eos
    return tokenizer.decode(ids[:-1] if ended else ids)


def _requests(
    options: argparse.Namespace, tokenizer: Tokenizer | None, checkpoint: Checkpoint
) -> Iterator[Request]:
    for number, line in enumerate(_lines(options), 1):
        where = f"{options.prompts} line {number}" if options.prompts else "the command line"
        yield _request(line, where, f"{number}", options, tokenizer, checkpoint)


def _lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.prompt is not None:
        yield {"prompt": options.prompt}
    elif options.prompt_ids is not None:
        try:
            yield {"prompt_ids": [int(i) for i in options.prompt_ids.split(",")]}
        except ValueError:
            raise RequestError(
                f"--prompt-ids {options.prompt_ids!r}: expected whole numbers, as 1,2,3"
            ) from None
    else:
        yield from _file(Path(options.prompts))


def _file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path} line {number} is no JSON: {error}") from None
        if not isinstance(data, dict) or not set(data) <= _FIELDS:
            extra = sorted(set(data) - _FIELDS) if isinstance(data, dict) else data
            raise RequestError(
                f"{path} line {number}: {extra!r} not understood; a line is an object with "
                f"{', '.join(sorted(_FIELDS))}"
            )
        yield data
    if not text.strip():
        raise RequestError(f"{path} holds no request; give one JSON object a line")


def _request(
    line: dict[str, Any],
    where: str,
    name: str,
    options: argparse.Namespace,
    tokenizer: Tokenizer | None,
    checkpoint: Checkpoint,
) -> Request:
    model = checkpoint.config
    if ("prompt" in line) == ("prompt_ids" in line):
        raise RequestError(f"{where}: give either prompt or prompt_ids")
    if "prompt" in line:
        if tokenizer is None:
            raise RequestError(f"{checkpoint.path} has no tokenizer.json; give prompt ids instead")
        ids = [model.bos_token_id, *tokenizer.encode_text(str(line["prompt"]))]
    else:
        ids = line["prompt_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise RequestError(f"{where}: prompt_ids must be a list of at least one whole number")
    wrong = next((i for i in ids if not 0 <= i < model.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"{where}: token id {wrong} is outside the vocabulary, 0 to {model.vocab_size - 1}"
        )
    tokens = line.get("max_tokens", options.max_tokens)
    temperature = line.get("temperature", options.temperature)
    seed = line.get("seed", options.seed)
    if type(tokens) is not int or tokens < 1:
        raise RequestError(f"{where}: max_tokens is {tokens!r}; expected a whole number from 1")
    if not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise RequestError(f"{where}: temperature is {temperature!r}; expected 0 to 2")
    if type(seed) is not int:
        raise RequestError(f"{where}: seed is {seed!r}; expected a whole number")
    return Request(
        name,
        tuple(ids),
        tokens,
        Sampling(float(temperature), seed=seed % (1 << 63)),
        (model.eos_token_id,),
        bool(line.get("ignore_eos", False)),
    )


def add_inspect(commands: Parsers) -> None:
    """`whalepod inspect`."""
    parser = commands.add_parser("inspect", help="show a checkpoint's tensors and sizes by role")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("folder", nargs="?", help="checkpoint folder")
    source.add_argument("--config", metavar="FILE", help="a config.json alone")
    parser.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> None:
    """Print the table of a folder or of a configuration."""
    if options.config:
        print(inspect_config(Path(options.config)))
    else:
        print(inspect_checkpoint(Path(options.folder)))


def add_make_tiny(commands: Parsers) -> None:
    """`whalepod make-tiny`."""
    parser = commands.add_parser("make-tiny", help="write a small random checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=write_tiny)


def write_tiny(options: argparse.Namespace) -> None:
    """Write the checkpoint and say what it is."""
    folder = make_tiny(options.folder, options.preset, options.seed)
    print(inspect_checkpoint(folder).splitlines()[-1], f"in {folder}", file=sys.stderr)


COMMANDS = (add_generate, add_inspect, add_make_tiny)
