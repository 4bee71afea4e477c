"""Compiled twins of the router's choice and of the sum of what the experts sent back."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.combine import combine
from whalepod.kernels.compiled import entry, runs
from whalepod.kernels.linear_cpu import plain
from whalepod.kernels.routes import choose_experts
from whalepod.kernels.simd import LANES, add, get, get_int, load, put, put_int, store

_BYTES = 4 * LANES


@entry("factor")
def _choose(logits, bias, given, tokens, experts, count, factor, scores, chosen, weights):
    for t in range(tokens):
        for e in range(experts):
            x = get(logits + (t * experts + e) * 4)
            high = x if x > 20 else np.float32(math.log1p(math.exp(x)))
            put(scores + e * 4, np.float32(math.sqrt(high)))
        whole = np.float32(0)
        for k in range(count):
            to, best, top = chosen + (t * count + k) * 8, 0, np.float32(-np.inf)
            if given:
                best = get_int(given + (t * count + k) * 8)
            else:
                for e in range(experts):
                    score = get(scores + e * 4) + get(bias + e * 4)
                    free = True
                    for earlier in range(k):
                        free = free and get_int(chosen + (t * count + earlier) * 8) != e
                    if free and score > top:
                        best, top = e, score
            put_int(to, best)
            whole += get(scores + best * 4)
        share = np.float32(factor) / max(whole, np.float32(1e-20))
        for k in range(count):
            best = get_int(chosen + (t * count + k) * 8)
            put(weights + (t * count + k) * 4, get(scores + best * 4) * share)


@choose_experts.twin("compiled", runs)
def _choose_experts(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    if not plain(logits_TE) or (bias_E is None and given_TK is None):
        return choose_experts.reference(logits_TE, bias_E, given_TK, count, factor)
    logits, scores = logits_TE.contiguous(), torch.empty(experts)
    given = None if given_TK is None else given_TK.contiguous()
    chosen = torch.empty(tokens, count, dtype=torch.int64)
    weights = torch.empty(tokens, count)
    _choose(
        *(logits.data_ptr(), 0 if bias_E is None else bias_E.data_ptr()),
        *(0 if given is None else given.data_ptr(), tokens, experts, count, factor),
        *(scores.data_ptr(), chosen.data_ptr(), weights.data_ptr()),
    )
    return chosen, weights


@entry()
def _combine(parts, tokens, count, width, y):
    for t in range(tokens):
        for d in range(0, width * 4, _BYTES):
            whole = load(parts + t * count * width * 4 + d)
            for k in range(1, count):
                whole = add(whole, load(parts + (t * count + k) * width * 4 + d))
            store(y + t * width * 4 + d, whole)


@combine.twin("compiled", runs)
def _combine_parts(parts_TKD: Tensor) -> Tensor:
    tokens, count, width = parts_TKD.shape
    if width % LANES or not plain(parts_TKD):
        return combine.reference(parts_TKD)
    parts, y = parts_TKD.contiguous(), torch.empty(tokens, width)
    _combine(parts.data_ptr(), tokens, count, width, y.data_ptr())
    return y
