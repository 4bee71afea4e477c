"""The router's choice among experts from the scores' logits.

Legend: T tokens, E routed experts, K chosen ones.
"""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.activation import sqrt_softplus
from whalepod.kernels.registry import Kernel


@Kernel
def choose_experts(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Choose by `sqrt(softplus(logits))` plus a bias, or take the given ones, and weigh them.

    Args:
        logits_TE: fp32.
        bias_E: takes part in the choice only.
        given_TK: int64, for layers that choose by token; then nothing is chosen.
        count: K. factor: what a token's weights add up to.

    Returns:
        experts `[T, K]` int64 and weights `[T, K]` fp32.
    """
    scores_TE = sqrt_softplus(logits_TE)
    if given_TK is None:
        biased = scores_TE if bias_E is None else scores_TE + bias_E
        given_TK = biased.topk(count, dim=-1).indices
    weights_TK = scores_TE.gather(1, given_TK)
    total = weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    return given_TK, weights_TK * (factor / total)
