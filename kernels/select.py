"""Pick the best entries of each row, with ties in a fixed order."""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.registry import Kernel


@Kernel
def select(scores_RE: Tensor, count: int) -> Tensor:
    """Choose the `count` largest of each row; among equal scores the first ones.

    Args:
        scores_RE: `[R, E]` fp32, E at least `count`; -inf marks what may be chosen last only.

    Returns:
        `[R, count]` int64, ascending within a row. The choice does not depend on how many worse
        entries stand behind (a top-k alone leaves the order of ties open, and index scores that
        ReLU has zeroed are often equal).
    """
    least_R1 = scores_RE.topk(count, dim=-1).values[:, -1:]
    better, equal = scores_RE > least_R1, scores_RE == least_R1
    wanted = count - better.sum(-1, keepdim=True)
    chosen = better | (equal & (equal.cumsum(-1) <= wanted))
    return chosen.nonzero()[:, 1].view(-1, count)


from whalepod.kernels import select_triton  # noqa: E402, F401  (registers its twin)
