"""The best token of each row of logits with its norm, and all tokens of a row by rank.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.jit import runs
from whalepod.kernels.registry import Kernel


@Kernel
def best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each row's largest logit, the first one among equals, and its logsumexp.

    Returns:
        `[N]` int64 and `[N]` fp32; of a row with a NaN any place, and NaN.
    """
    return logits_NV.argmax(-1), logits_NV.logsumexp(-1)


@Kernel
def ranked(logits_V: Tensor) -> Tensor:
    """Return the places of `[V]` fp32 logits from the largest to the smallest, `[V]` int64.

    Among equals the first comes first.
    """
    return logits_V.sort(descending=True, stable=True).indices


from whalepod.kernels import draw_triton as _twins  # noqa: E402

best_tokens.twin("triton", runs)(_twins.best_tokens)
