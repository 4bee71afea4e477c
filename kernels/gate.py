"""The router's choice in one operation: scores, selection, weights.

Legend: T tokens, K experts a token, E routed experts, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.activation import sqrt_softplus
from whalepod.kernels.dense import dense
from whalepod.kernels.jit import jit, runs, tl, triton
from whalepod.kernels.linear import linear
from whalepod.kernels.overlap import begin, early
from whalepod.kernels.registry import Kernel

_FLOOR = 1e-20  # of the sum of a token's scores


@Kernel
def gate(
    x_TD: Tensor,
    weight_ED: Tensor,
    count: int,
    scale: float,
    bias_E: Tensor | None = None,
    table_VK: Tensor | None = None,
    token_ids_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `count` experts a token, by score or by token id.

    Scores are `sqrt(softplus(x Wᵀ))` with sums in fp32. The bias takes part in the selection only;
    of equal sums the lowest id is chosen. Weights are the chosen scores over their sum, times `scale`.

    Args:
        x_TD: `[T, D]` bf16 or fp32. weight_ED: `[E, D]` bf16 or fp32.
        bias_E: `[E]` fp32, of layers that choose by score.
        table_VK: `[V, K]` int64 expert ids by token, of layers that choose by token id.
        token_ids_T: `[T]` int64, with `table_VK`; ids outside the vocabulary are clamped.

    Returns:
        Expert ids `[T, K]` int64, by falling sum or as in the table, and weights `[T, K]` fp32.
    """
    scores_TE = sqrt_softplus(linear(x_TD.float(), weight_ED.float()))
    if table_VK is None:
        assert bias_E is not None, (
            "a gate chooses by score, with a bias, or by token id, with a table"
        )
        ranked = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True)
        experts_TK = ranked.indices[:, :count]
    else:
        assert token_ids_T is not None, "a table is read by token ids"
        experts_TK = table_VK[token_ids_T.clamp(0, table_VK.shape[0] - 1)]
    weights_TK = scores_TE.gather(1, experts_TK)
    total = weights_TK.sum(-1, keepdim=True).clamp_min(_FLOOR)
    return experts_TK, weights_TK * (scale / total)


@jit
def _scores(parts, t, tokens, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr):
    """Sum a token's parts in order and apply `sqrt(log1p(exp(x)))`; -1 behind the last expert."""
    e = tl.arange(0, WIDE)
    at = parts + t * EXPERTS + e
    logit = tl.load(at, mask=e < EXPERTS, other=0.0)
    for c in tl.static_range(1, CHUNKS):
        logit += tl.load(at + c * tokens * EXPERTS, mask=e < EXPERTS, other=0.0)
    small = tl.exp(tl.where(logit > 20.0, 20.0, logit))  # unlike a minimum it leaves a NaN one
    above = 1.0 + small  # log1p: the rounding of this sum is divided out
    ratio = tl.where(above == 1.0, 1.0, small / tl.where(above == 1.0, 1.0, above - 1.0))
    soft = tl.where(above == 1.0, small, tl.log(above) * ratio)
    return tl.where(e < EXPERTS, tl.sqrt_rn(tl.where(logit > 20.0, logit, soft)), -1.0)


@jit
def _choose_kernel(
    parts, bias, table, ids, experts, weights, tokens, scale, vocabulary,
    EXPERTS: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, HASHED: tl.constexpr,
    WIDE: tl.constexpr, FEW: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, WIDE), tl.arange(0, FEW)
    score = _scores(parts, t, tokens, EXPERTS, CHUNKS, WIDE)
    ids_K, score_K = tl.zeros((FEW,), tl.int64), tl.zeros((FEW,), tl.float32)
    ranked = score
    if HASHED:
        token = tl.minimum(tl.maximum(tl.load(ids + t), 0), vocabulary - 1)
    else:
        ranked = score + tl.load(bias + e, mask=e < EXPERTS)
        ranked = tl.where(ranked == ranked, ranked, -3e38)  # of a NaN's row too, as many experts
        ranked = tl.where(e < EXPERTS, ranked, float("-inf"))
    total = 0.0
    for i in tl.static_range(COUNT):
        if HASHED:
            best = tl.load(table + token * COUNT + i).to(tl.int32)
        else:
            best = tl.min(tl.where(ranked == tl.max(ranked, 0), e, WIDE), 0)
            ranked = tl.where(e == best, float("-inf"), ranked)
        found = tl.sum(tl.where(e == best, score, 0.0), 0)
        total += found
        ids_K, score_K = tl.where(k == i, best, ids_K), tl.where(k == i, found, score_K)
    by = scale / tl.maximum(total, 1e-20)
    tl.store(experts + t * COUNT + k, ids_K, mask=k < COUNT)
    tl.store(weights + t * COUNT + k, score_K * by, mask=k < COUNT)


@gate.twin("triton", runs)
def _gate(
    x_TD: Tensor,
    weight_ED: Tensor,
    count: int,
    scale: float,
    bias_E: Tensor | None = None,
    table_VK: Tensor | None = None,
    token_ids_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (tokens, width), wide = x_TD.shape, weight_ED.shape[0]
    experts = x_TD.new_empty(tokens, count, dtype=torch.int64)
    weights = x_TD.new_empty(tokens, count, dtype=torch.float32)
    if not tokens:
        return experts, weights
    x, w = x_TD.contiguous(), weight_ED.contiguous()
    if x.dtype != w.dtype:  # every bf16 number is an fp32 one
        x, w = x.float(), w.float()
    parts = dense(x, None, w, None, "bf16", wide, width, torch.float32, parts=True)
    _choose_kernel[(tokens,)](
        parts, bias_E, table_VK, token_ids_T, experts, weights, tokens, scale,
        0 if table_VK is None else table_VK.shape[0], EXPERTS=wide, COUNT=count,
        CHUNKS=parts.shape[0], HASHED=table_VK is not None, WIDE=triton.next_power_of_2(wide),
        FEW=triton.next_power_of_2(count), num_warps=2, **early(),
    )  # fmt: skip
    return experts, weights
