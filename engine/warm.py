"""Compile what a GPU will run before anybody waits for it: passes over nothing, of the sizes to come.

Kernels are compiled for sizes and types when they are first launched, seconds each, and kept on disk. A
member does that before it enters an epoch, or its peers would take it for dead. What is written lies where
no sequence looks: rings and blocks are read up to a position that only real passes set.

Legend: T rows, K experts per token, D width.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from whalepod.engine.attention import AttentionStage
from whalepod.engine.expert import ExpertShard
from whalepod.engine.graph import DecodeGraphs, rows_of
from whalepod.engine.request import Sampling
from whalepod.engine.router import Router
from whalepod.engine.sampler import sample
from whalepod.engine.step import MicroBatch, Part
from whalepod.model.batch import Batch, Span
from whalepod.model.stack import ExpertStack

log = logging.getLogger(__name__)
_DRAWS = (Sampling(0.0), Sampling(0.8, 0.9, 40, seed=1))


class Absent:
    """Experts that answer with zeros: sums, or with `choices` outputs a row, as local stacks do."""

    places: tuple[int, ...] = ()
    key: tuple[int, ...] = ()

    def __init__(self, choices: int = 0) -> None:
        self._choices = choices
        self._zeros: dict[tuple[int, int], Tensor] = {}

    def send(self, layer: int, micro_batch: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Note how many rows want an answer."""
        tokens, width = x_TD.shape
        self._zeros[layer, micro_batch] = (
            x_TD.new_zeros(tokens, self._choices, width)
            if self._choices
            else x_TD.new_zeros(tokens, width, dtype=torch.float32)
        )

    def receive(self, layer: int, micro_batch: int) -> Tensor:
        """Give it."""
        return self._zeros.pop((layer, micro_batch))

    def settle(self) -> None:
        """Nothing is under way."""


def sizes_up_to(most: int) -> list[int]:
    """Powers of two, and the largest size itself."""
    return [1 << n for n in range(most.bit_length()) if 1 << n < most] + [most]


def warm_stage(
    stage: AttentionStage, max_batch: int, step_tokens: int, context: int, choices: int = 0
) -> None:
    """Decode with one row to `max_batch` in short and long contexts, draw, and take prompts in.

    Args:
        stage: with every layer.
        step_tokens: most rows of a prompt in a pass. context: most tokens of a sequence.
        choices: of the experts' answers, see `Absent`.
    """
    start, experts, cache = time.monotonic(), Absent(choices), stage.cache
    graphs = DecodeGraphs(stage, capture=False)
    longest = min(context, cache.blocks * cache.block_tokens) - 1
    for rows in sorted({rows_of(n) or n for n in sizes_up_to(min(max_batch, cache.slots))}):
        for at in {1, longest}:
            blocks = tuple(range(at // cache.block_tokens + 1))
            parts = tuple(
                Part(i % cache.slots, at, (0,), blocks, (_DRAWS[i % 2], at + 1))
                for i in range(rows)
            )
            micro_batch = MicroBatch(parts)
            made = graphs.run([micro_batch], experts)
            if made is not None:
                settings, positions = zip(*micro_batch.draws(), strict=True)
                sample(made[0][2], settings, positions)
    for count in sizes_up_to(min(step_tokens, longest)):
        blocks = tuple(range(-(-count // cache.block_tokens)))
        ids = [0] * count
        batch = Batch.of(ids, [Span(0, 0, 0, count, blocks)], cache.block_tokens, stage.device)
        x = stage.forward([batch], [stage.embed(batch)], experts)
        stage.logits(x[0], [count - 1])
    _done("attention", stage.device, start)


def warm_shard(shard: ExpertShard, most: int) -> None:
    """Run one row to `most` through the experts of one layer; all layers run the same kernels."""
    start, config = time.monotonic(), shard.config
    table = next(iter(shard.experts.values()), None)
    if not isinstance(table, ExpertStack) or not len(table):
        return
    k, held = config.num_experts_per_tok, torch.tensor([*table], device=shard.device)
    for rows in sizes_up_to(most):
        x_TD = torch.zeros(rows, config.hidden_size, dtype=shard.dtype, device=shard.device)
        at_TK = torch.arange(rows * k, device=shard.device).view(rows, k) % len(held)
        table(x_TD, held[at_TK], torch.ones(rows, k, device=shard.device))
    _done("experts", shard.device, start)


def warm_router(router: Router, most: int) -> None:
    """Route one row to `most` in the first and the last layer: by token id and by score."""
    start, width = time.monotonic(), router.config.hidden_size
    for layer in {min(router.gates), max(router.gates)}:
        for rows in sizes_up_to(most):
            x_TD = torch.zeros(rows, width, dtype=router.dtype, device=router.device)
            router.gates[layer].route(
                x_TD, torch.zeros(rows, dtype=torch.int64, device=x_TD.device)
            )
    _done("router", router.device, start)


def _done(what: str, device: torch.device, start: float) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    log.info("%s: kernels ready in %.1f s", what, time.monotonic() - start)
