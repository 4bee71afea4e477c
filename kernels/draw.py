"""The best token of each row of logits, and what its log-probabilities are measured from.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from whalepod.kernels.registry import Kernel


@Kernel
def best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each row's largest logit, the first one among equals, and its logsumexp.

    Returns:
        `[N]` int64 and `[N]` fp32.
    """
    return logits_NV.argmax(-1), logits_NV.logsumexp(-1)
