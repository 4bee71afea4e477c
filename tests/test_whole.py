from __future__ import annotations

from functools import cache

import pytest
import torch
from configs_oracle import CONFIGS, SEEDS
from oracle_hf import Oracle, Weights, random_weights
from torch import Tensor

from whalepod.model.shape import ModelConfig
from whalepod.model.whole import WholeModel

LENGTH, LONG = 150, 301
ODD = ([33, 1, 7, 1, 1, 107], [5, 123, 1, 3, 18], [127, 1, 1, 21], [3, 1, 1, 1, 144])


@cache
def weights(name: str) -> Weights:
    return random_weights(CONFIGS[name], SEEDS[name])


@cache
def oracle(name: str) -> Oracle:
    return Oracle(CONFIGS[name], weights(name))


@cache
def model(name: str) -> WholeModel:
    return WholeModel(ModelConfig.from_dict(CONFIGS[name]), weights(name))


@cache
def tokens(name: str) -> list[int]:
    g = torch.Generator().manual_seed(SEEDS[name] + 1)
    return torch.randint(0, CONFIGS[name]["vocab_size"], (LONG,), generator=g).tolist()


@cache
def expected(name: str) -> Tensor:
    return oracle(name).logits(tokens(name))


def chunked(name: str, sizes: list[int]) -> Tensor:
    whole, ids, parts, at = model(name), tokens(name), [], 0
    state = whole.new_state(sum(sizes))
    for size in sizes:
        parts.append(whole.forward(state, ids[at : at + size]))
        at += size
    whole.release(state)
    return torch.cat(parts)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


every_config = pytest.mark.parametrize("name", CONFIGS)


@every_config
def test_one_shot_equals_transformers(name: str) -> None:
    assert expected(name).std() > 0.3  # the comparison is about something
    close(chunked(name, [LONG]), expected(name))


@every_config
@pytest.mark.parametrize("sizes", ODD, ids=str)
def test_odd_chunks_equal_transformers(name: str, sizes: list[int]) -> None:
    close(chunked(name, sizes), expected(name)[: sum(sizes)])


@every_config
def test_decoding_crosses_a_window_of_128(name: str) -> None:
    sizes = [120] + [1] * 16
    close(chunked(name, sizes), expected(name)[:136])


@every_config
def test_ragged_batch_equals_alone_bit_for_bit(name: str) -> None:
    whole, ids = model(name), tokens(name)
    # Three sequences at different points: decode, a chunk and decode, chunks throughout.
    plans = [[129, 1, 1, 1], [5, 40, 1, 86], [17, 3, 110, 2]]
    parts = [ids[10:], ids[:], ids[100:]]

    def alone(plan: list[int], part: list[int]) -> Tensor:
        state, outs, at = whole.new_state(sum(plan)), [], 0
        for n in plan:
            outs.append(whole.forward(state, part[at : at + n]))
            at += n
        whole.release(state)
        return torch.cat(outs)

    wanted = [alone(plan, part) for plan, part in zip(plans, parts, strict=True)]
    states = [whole.new_state(sum(plan)) for plan in plans]
    got: list[list[Tensor]] = [[], [], []]
    for step in range(4):
        chunks = []
        for state, plan, part in zip(states, plans, parts, strict=True):
            chunks.append(part[state.length : state.length + plan[step]])
        for outs, out in zip(got, whole.forward_batch(states, chunks), strict=True):
            outs.append(out)
    for state in states:
        whole.release(state)
    for outs, want in zip(got, wanted, strict=True):
        assert torch.equal(torch.cat(outs), want)


@pytest.mark.parametrize("name", ["pro", "flash"])
def test_greedy_tokens_equal_transformers(name: str) -> None:
    prompt, new = tokens(name)[:121], 12
    whole = model(name)
    state = whole.new_state(len(prompt) + new)
    made = [int(whole.forward(state, prompt)[-1].argmax())]
    while len(made) < new:
        made.append(int(whole.forward(state, made[-1:])[-1].argmax()))
    whole.release(state)
    assert made == oracle(name).greedy(prompt, new)


@pytest.mark.slow
@every_config
def test_long_decode_equals_transformers_over_its_cache(name: str) -> None:
    """300 single steps cross two windows of 128 and fill every ring more than twice."""
    sizes = [1] * LONG
    close(chunked(name, sizes), oracle(name).chunked(tokens(name), sizes))
